from __future__ import annotations

import asyncio
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actors.vllm.vllm_arguments import (
    engine_arguments,
    engine_environment,
)
from rlhf_cluster.errors import ConfigError, StalledError, WeightError, WorkerError
from rlhf_cluster.generation.engine import (
    Engine,
    LoadedWeights,
    Request,
    Sample,
)
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.generation.segments import (
    expand_spans,
    group_seed,
)
from rlhf_cluster.records import FinishReason, Prompt, Sampling, Ticket
from tests.support.builders.run_configs import tiny_config
from tests.support.engines import scripted_engine
from tests.support.engines.scripted_engine import VOCABULARY
from tests.support.fakes.services import make_version

ENGINE = "tests.support.engines.scripted_engine:make_engine"
SAMPLING = Sampling(num_samples=4, temperature=1.0, max_tokens=16)
TICKET = Ticket(number=7, version=0)
PROMPT = Prompt(
    prompt_id="p7",
    token_ids=np.array([VOCABULARY[c] for c in "503917="], dtype=np.int32),
    source="503917=",
)


@pytest.fixture
def model_dir(tmp_path: Path) -> str:
    scripted_engine.write_tokenizer(tmp_path)
    return str(tmp_path)


async def _worker(model_dir: str, name: str = "generation-0", **changes: Any) -> GenerationWorker:
    worker = GenerationWorker(tiny_config(**changes), model_dir, name, ENGINE)
    await worker.start()
    return worker


async def test_a_group_carries_the_engines_tokens_unchanged(model_dir):
    worker = await _worker(model_dir)
    await worker.pull(make_version(3))
    meta, group = await worker.generate(TICKET, PROMPT, SAMPLING)
    assert meta["group_id"] == group.group_id == TICKET.group_id
    assert [r.rollout_id for r in group.rollouts] == [f"{TICKET.group_id}/{i}" for i in range(4)]
    assert meta["num_tokens"] == sum(len(r.response_ids) for r in group.rollouts) == 4 * 7
    assert meta["worker"] == "generation-0"
    assert meta["generate_s"] >= 0
    for rollout in group.rollouts:
        assert rollout.response_ids[-1] == VOCABULARY["<eos>"]
        assert rollout.finish_reason is FinishReason.STOP
        assert rollout.response_mask.all()
        assert rollout.versions.tolist() == [3] * 7
        assert (rollout.sampled_logprobs <= 0).all()
        assert rollout.prompt_ids is PROMPT.token_ids
        assert rollout.finished_s >= rollout.started_s > 1.7e9


@pytest.mark.parametrize("num_waiting", [0, 3])
async def test_a_group_tells_whether_requests_waited_at_its_end(num_waiting):
    worker = await _fake_worker(lambda request: [_one_sample()] * request.num_samples)
    _fakes[-1].num_waiting = num_waiting
    meta, _ = await worker.generate(TICKET, PROMPT, SAMPLING)
    assert meta["queued"] == (num_waiting > 0)


async def test_the_scripted_engine_learns_with_the_version(model_dir):
    worker = await _worker(model_dir)
    correct = [VOCABULARY[c] for c in "013579"] + [VOCABULARY["<eos>"]]
    shares = []
    for version in (0, 9):
        await worker.pull(make_version(version))
        sampling = Sampling(num_samples=200, temperature=1.0, max_tokens=16)
        _, group = await worker.generate(TICKET, PROMPT, sampling)
        shares.append(np.mean([r.response_ids.tolist() == correct for r in group.rollouts]))
    assert shares[0] < 0.3
    assert shares[1] == 1.0


async def test_an_answer_over_max_tokens_is_cut(model_dir):
    worker = await _worker(model_dir)
    _, group = await worker.generate(
        TICKET, PROMPT, Sampling(num_samples=1, temperature=1.0, max_tokens=3)
    )
    assert len(group.rollouts[0].response_ids) == 3
    assert group.rollouts[0].finish_reason is FinishReason.LENGTH


async def test_s36_a_reissued_group_is_the_same_on_any_worker_and_groups_differ(model_dir):
    first, second = [await _worker(model_dir, name=f"generation-{i}") for i in range(2)]
    _, group = await first.generate(TICKET, PROMPT, SAMPLING)
    _, again = await second.generate(TICKET, PROMPT, SAMPLING)
    _, other = await first.generate(Ticket(number=8, version=0), PROMPT, SAMPLING)
    logprobs = [[r.sampled_logprobs.tolist() for r in g.rollouts] for g in (group, again, other)]
    assert logprobs[0] == logprobs[1]
    assert not {tuple(row) for row in logprobs[0]} & {tuple(row) for row in logprobs[2]}


def test_s36_seeds_depend_on_run_and_group_and_fit_63_bits():
    seeds = {group_seed(run, f"t{n:08d}") for run in range(10) for n in range(1000)}
    assert len(seeds) == 10_000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62
    code = (
        "from rlhf_cluster.generation.segments import group_seed; print(group_seed(3, 't00000007'))"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert int(other.stdout) == group_seed(3, "t00000007")


async def test_tokens_sampled_across_an_update_are_labelled_with_both_versions(model_dir):
    worker = await _worker(model_dir)
    await worker.pull(make_version(1))
    scripted_engine.write_script(model_dir, generate_delay_s=0.05)
    running = asyncio.create_task(worker.generate(TICKET, PROMPT, SAMPLING))
    await asyncio.sleep(0)  # one turn of the loop: the request reaches the engine
    assert (await worker.health())["num_in_flight"] == 1
    await worker.pull(make_version(2))
    _, group = await running
    assert group.rollouts[0].versions.tolist() == [1, 1, 1, 2, 2, 2, 2]
    assert group.rollouts[0].oldest_version == 1


@pytest.mark.parametrize(
    "spans",
    [[], [(0, 0, 3)], [(0, 1, 4)], [(0, 0, 2), (1, 3, 4)], [(0, 0, 5), (1, 5, 4)], [(0, 0, 5)]],
)
def test_spans_that_do_not_tile_the_response_are_refused(spans):
    with pytest.raises(WorkerError, match="do not tile 4"):
        expand_spans(spans, 4)


def test_spans_expand_to_one_version_a_token():
    versions = expand_spans([(-1, 0, 1), (4, 1, 4)], 4)
    assert versions.dtype == np.int32
    assert versions.tolist() == [-1, 4, 4, 4]


class FakeEngine(Engine):
    """Answers what it is told to."""

    def __init__(self, samples: Callable[[Request], list[Sample]], loaded: LoadedWeights | None):
        self._samples, self._loaded = samples, loaded
        self.requests: list[Request] = []
        self.num_waiting = 0

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Sample]:
        self.requests.append(request)
        return self._samples(request)

    async def load_weights(self, version: Any) -> LoadedWeights:
        assert self._loaded is not None
        return self._loaded

    def stats(self) -> dict[str, float]:
        return {"num_running": 2.0, "num_waiting": float(self.num_waiting)}

    def check(self) -> None: ...

    async def close(self) -> None: ...


_fakes: list[FakeEngine] = []


def make_fake_engine(config: Any, model_dir: str, worker_name: str) -> FakeEngine:
    return _fakes[-1]


async def _fake_worker(
    samples: Any = None, loaded: LoadedWeights | None = None
) -> GenerationWorker:
    _fakes.append(FakeEngine(samples or (lambda request: [_one_sample()]), loaded))
    worker = GenerationWorker(tiny_config(), "unused", "fake-0", f"{__name__}:make_fake_engine")
    await worker.start()
    return worker


def _one_sample(**changes: Any) -> Sample:
    values = {
        "token_ids": [5, 6],
        "logprobs": [-1.0, -2.0],
        "version_spans": [(0, 0, 2)],
        "finish_reason": "stop",
    }
    return Sample(**(values | changes))


async def test_a_short_answer_of_the_engine_is_refused():
    worker = await _fake_worker()
    with pytest.raises(WorkerError, match="1 samples, 4 were asked for"):
        await worker.generate(TICKET, PROMPT, SAMPLING)


@pytest.mark.parametrize("logprobs", [[-1.0], [-1.0, math.nan]])
async def test_an_inconsistent_sample_never_becomes_a_rollout(logprobs):
    worker = await _fake_worker(lambda _: [_one_sample(logprobs=logprobs)])
    with pytest.raises(ValueError, match="sampled_logprobs"):
        await worker.generate(
            TICKET, PROMPT, Sampling(num_samples=1, temperature=1.0, max_tokens=9)
        )


async def test_a_group_issued_twice_to_one_worker_is_two_requests():
    worker = await _fake_worker()
    sampling = Sampling(num_samples=1, temperature=1.0, max_tokens=9)
    await asyncio.gather(*[worker.generate(TICKET, PROMPT, sampling) for _ in range(2)])
    first, second = _fakes[-1].requests
    assert first.request_id != second.request_id
    assert first.seed == second.seed


@pytest.mark.parametrize("field", ["version", "digest", "num_tensors"])
async def test_s24_weights_that_are_not_the_published_ones_never_count_as_live(field):
    version = make_version(5)
    good = {"version": 5, "digest": version.digest, "num_tensors": version.num_tensors}
    wrong = {"version": 4, "digest": "another", "num_tensors": 1}[field]
    loaded = LoadedWeights(**(good | {field: wrong}), pause_s=0.0)
    worker = await _fake_worker(loaded=loaded)
    with pytest.raises(WeightError, match=f"loaded {field} {wrong}"):
        await worker.pull(version)
    with pytest.raises(WorkerError, match=f"weights are lost .*loaded {field} {wrong}"):
        await worker.health()


async def test_s24_a_pulled_version_is_live_and_counted(model_dir):
    worker = await _worker(model_dir)
    assert (await worker.health())["version"] is None
    await worker.pull(make_version(5))
    health = await worker.health()
    assert (health["version"], health["digest"], health["num_in_flight"]) == (5, "d5", 0)
    scripted_engine.write_script(model_dir, fail_pull=True)
    with pytest.raises(WeightError):
        await worker.pull(make_version(6))
    assert (await worker.health())["version"] == 5
    stats = await worker.stats()
    assert stats["worker/num_pulls_total"] == 1
    assert stats["engine/num_running"] == 0


async def test_a_hanging_engine_ends_in_an_error_that_names_the_deadline(model_dir):
    limits = {"request_timeout_s": 0.05, "pull_timeout_s": 0.05}
    worker = await _worker(model_dir, generation=limits)
    scripted_engine.write_script(model_dir, hang_generate=True, hang_pull=True)
    with pytest.raises(StalledError, match=rf"{TICKET.group_id} .*request_timeout_s = 0\.05"):
        await worker.generate(TICKET, PROMPT, SAMPLING)
    with pytest.raises(StalledError, match=r"version 5 of /weights/v5 .*pull_timeout_s = 0\.05"):
        await worker.pull(make_version(5))
    stats = await worker.stats()
    assert stats["engine/num_running"] == stats["worker/num_in_flight"] == 0


async def test_a_dead_engine_fails_the_health_check(model_dir):
    worker = await _worker(model_dir)
    scripted_engine.write_script(model_dir, workers={"generation-0": {"fail_check": True}})
    with pytest.raises(WorkerError, match="generation-0"):
        await worker.health()


async def test_a_worker_serves_only_between_start_and_close(model_dir):
    worker = GenerationWorker(tiny_config(), model_dir, "generation-0", ENGINE)
    with pytest.raises(WorkerError, match="call start first"):
        await worker.health()
    assert (await worker.start())["start_s"] >= 0
    await worker.health()
    await worker.close()
    with pytest.raises(WorkerError, match="call start first"):
        await worker.generate(TICKET, PROMPT, SAMPLING)


@pytest.mark.parametrize(
    "path", ["nowhere:make", "tests.support.engines.scripted_engine:nothing", "no-colon"]
)
async def test_a_wrong_engine_factory_is_named(path):
    with pytest.raises(ConfigError, match=path):
        await GenerationWorker(tiny_config(), "unused", "generation-0", path).start()


def test_engine_arguments_follow_the_run():
    arguments = engine_arguments(tiny_config(), "folder", "generation-0")
    expected = {
        "model": "folder",
        "dtype": "float32",
        "max_model_len": 16,
        "kv_cache_memory_bytes": 32 << 20,
        "block_size": 32,
        "logprobs_mode": "processed_logprobs",
        "enforce_eager": True,
        "distributed_executor_backend": "uni",
        "async_scheduling": False,
    }
    assert {key: arguments[key] for key in expected} == expected
    on_gpu = {"num_gpus": 2, "tensor_parallel_size": 2, "enforce_eager": False}
    arguments = engine_arguments(tiny_config(generation=on_gpu), "folder", "generation-0")
    assert arguments["distributed_executor_backend"] == "mp"
    assert not arguments["enforce_eager"]
    assert not {"block_size", "gpu_memory_utilization"} & set(arguments), "vLLM's own"


def test_a_worker_with_a_share_of_a_gpu_asks_for_no_more_of_its_memory():
    shares = {"num_gpus": 0.4, "kv_cache_bytes": 1 << 30}
    arguments = engine_arguments(tiny_config(generation=shares), "folder", "generation-0")
    assert arguments["gpu_memory_utilization"] == pytest.approx(0.9 * 0.4)
    assert arguments["kv_cache_memory_bytes"] == 1 << 30


def test_s36_engines_of_two_workers_have_different_seeds():
    seeds = {engine_arguments(tiny_config(), "m", f"generation-{i}")["seed"] for i in range(100)}
    assert len(seeds) == 100


def test_further_engine_arguments_win_except_over_what_versions_depend_on():
    config = tiny_config(
        generation={"engine_args": {"max_num_batched_tokens": 64, "dtype": "auto"}}
    )
    arguments = engine_arguments(config, "m", "generation-0")
    assert (arguments["max_num_batched_tokens"], arguments["dtype"]) == (64, "auto")
    config = tiny_config(generation={"engine_args": {"async_scheduling": True}})
    with pytest.raises(ConfigError, match="async_scheduling"):
        engine_arguments(config, "m", "generation-0")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("speculative", {"method": "ngram", "num_speculative_tokens": 3}),
        ("quantization", "compressed-tensors"),
    ],
)
def test_what_vllm_gets_wrong_on_cpu_is_refused_there_alone(key, value):
    with pytest.raises(ConfigError, match=f"generation.{key}"):
        engine_arguments(tiny_config(generation={key: value}), "m", "generation-0")
    on_gpu = tiny_config(generation={key: value, "num_gpus": 1})
    assert value in engine_arguments(on_gpu, "m", "generation-0").values()


def test_the_environment_of_a_cpu_engine_holds_back_compilation_and_threads():
    assert engine_environment(on_gpu=False)["TORCHDYNAMO_DISABLE"] == "1"
    assert engine_environment(on_gpu=False, num_threads=3)["OMP_NUM_THREADS"] == "3"
    assert engine_environment(on_gpu=False)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert "OMP_NUM_THREADS" not in engine_environment(on_gpu=True)
    for on_gpu in (False, True):
        assert engine_environment(on_gpu)["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


async def test_a_greedy_baseline_comes_beside_the_samples_and_is_none_of_them(model_dir):
    worker = await _worker(model_dir)
    sampling = Sampling(num_samples=2, temperature=0.7, max_tokens=16, greedy_baseline=True)
    meta, group = await worker.generate(TICKET, PROMPT, sampling)
    assert [r.rollout_id for r in group.rollouts] == [f"{TICKET.group_id}/{i}" for i in range(2)]
    assert {r.temperature for r in group.rollouts} == {0.7}
    assert group.greedy is not None
    assert (group.greedy.rollout_id, group.greedy.temperature) == (f"{TICKET.group_id}/greedy", 0)
    # the scripted engine's greedy answer is the right one
    correct = [VOCABULARY[c] for c in "013579"] + [VOCABULARY["<eos>"]]
    assert group.greedy.response_ids.tolist() == correct
    assert meta["num_tokens"] == 3 * 7
    _, without = await worker.generate(TICKET, PROMPT, SAMPLING)
    assert without.greedy is None


async def test_a_greedy_request_that_hangs_fails_the_group_at_the_deadline(model_dir):
    worker = await _worker(model_dir, generation={"request_timeout_s": 0.2})
    engine = worker._engine
    answer = engine.generate

    async def hang_when_greedy(request: Request) -> list[Sample]:
        if request.temperature == 0:
            await asyncio.Event().wait()
        return await answer(request)

    engine.generate = hang_when_greedy
    sampling = Sampling(num_samples=2, temperature=1.0, max_tokens=16, greedy_baseline=True)
    with pytest.raises(StalledError, match="was not sampled"):
        await worker.generate(TICKET, PROMPT, sampling)
