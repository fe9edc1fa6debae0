"""The real engine on CPU, against transformers: what it samples, and what an update does to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.engine import Request, Sample
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import DataError, WeightError, WorkerError
from rlhf_cluster.records import WeightVersion
from tests import engine_process, tiny_llama

MAX_RESPONSE = 300
TOLERANCE = 1e-4  # nats, float32 on both sides


@dataclass(frozen=True, slots=True)
class Models:
    """Folder of the first model; it and a second set of weights in transformers."""

    folder: Path
    first: Any
    second: Any


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("model")
    first, second = (tiny_llama.build(seed=s, max_position=512) for s in (0, 1))
    tiny_llama.save(first, folder)
    return Models(folder, first, second)


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[engine_process.EngineProcess]:
    process = engine_process.EngineProcess(_config(), str(models.folder))
    yield process
    process.close()


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., WeightVersion]:
    def publish(version: int, model: Any, **changes: Any) -> WeightVersion:
        tensors = tiny_llama.checkpoint_tensors(model) | changes
        kept = {name: t for name, t in tensors.items() if t is not None}
        return tiny_llama.publish(tmp_path / "weights", version, kept)

    return publish


def _config() -> RunConfig:
    tree = {
        "run": {"name": "engine-test", "steps": 1, "groups_per_step": 1},
        "model": {"path": "unused"},
        "data": {"task": "sort_digits", "max_prompt_tokens": 16},
        "generation": {
            "max_response_tokens": MAX_RESPONSE,
            "dtype": "float32",
            "max_num_seqs": 64,
            "kv_cache_bytes": 64 << 20,
        },
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "learner": {"learning_rate": 1e-3},
    }
    return validate(RunConfig, tree, source="test")


def _request(name: str, **changes: Any) -> Request:
    values: dict[str, Any] = {
        "request_id": name,
        "prompt_ids": [2, 20, 21, 22],
        "num_samples": 1,
        "max_tokens": 48,
        "temperature": 1.0,
        "seed": 11,
    }
    return Request(**(values | changes))


def _expected_logprobs(model: Any, request: Request, sample: Sample) -> np.ndarray:
    """[T] log-probabilities of a sample under the learner's own forward pass."""
    ids = torch.tensor([request.prompt_ids + sample.token_ids])
    with torch.no_grad():
        logits = model(ids).logits[0, len(request.prompt_ids) - 1 : -1]
    logprobs = torch.log_softmax(logits / request.temperature, dim=-1)
    return logprobs.gather(-1, torch.tensor(sample.token_ids)[:, None])[:, 0].numpy()


def _worst(model: Any, request: Request, sample: Sample, first: int = 0) -> float:
    error = np.asarray(sample.logprobs) - _expected_logprobs(model, request, sample)
    return float(np.abs(error[first:]).max())


def _damage(version: WeightVersion) -> Callable[[], object]:
    """Flip one bit in the middle of the version's file; returns what undoes it."""
    (shard,) = Path(version.path).glob("*.safetensors")
    good = shard.read_bytes()
    middle = len(good) // 2
    shard.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    return lambda: shard.write_bytes(good)


async def _until(engine: engine_process.EngineProcess, ready: Callable[[dict], bool]) -> None:
    """Waits for: the engine's own numbers. Unblocked by: its steps, or 60 s."""
    async with asyncio.timeout(60):
        # The engine is in another process, which has no event to wait for.
        while not ready(await engine.stats()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_s12_logprobs_equal_the_learners_at_every_token(engine, models, publish, temperature):
    await engine.load_weights(publish(1, models.first))
    request = _request(f"parity-{temperature}", temperature=temperature, num_samples=8)
    samples = await engine.generate(request)
    assert len(samples) == 8
    assert max(_worst(models.first, request, s) for s in samples) < TOLERANCE


async def test_the_end_token_is_part_of_the_response_with_its_logprob(engine, models, publish):
    await engine.load_weights(publish(1, models.first))
    request = _request("ends", num_samples=16, max_tokens=MAX_RESPONSE)
    samples = await engine.generate(request)
    stopped = [s for s in samples if s.finish_reason == "stop"]
    cut = [s for s in samples if s.finish_reason == "length"]
    assert stopped, "no sample ended by itself; the test needs a model that sometimes does"
    for sample in stopped:
        assert sample.token_ids[-1] == tiny_llama.END
        assert tiny_llama.END not in sample.token_ids[:-1]
        assert _worst(models.first, request, sample) < TOLERANCE
    assert all(len(s.token_ids) == MAX_RESPONSE for s in cut)


async def test_s36_samples_differ_and_the_same_seed_repeats_them(engine):
    first, again, other = await asyncio.gather(
        engine.generate(_request("seed-a", num_samples=8)),
        engine.generate(_request("seed-b", num_samples=8)),
        engine.generate(_request("seed-c", num_samples=8, seed=12345678901234567)),
    )
    assert len({tuple(s.token_ids) for s in first}) == 8
    assert [s.token_ids for s in first] == [s.token_ids for s in again]
    assert not {tuple(s.token_ids) for s in first} & {tuple(s.token_ids) for s in other}


async def test_temperature_zero_takes_the_likeliest_token(engine, models, publish):
    await engine.load_weights(publish(1, models.first))
    request = _request("greedy", temperature=0.0)
    (sample,) = await engine.generate(request)
    ids = torch.tensor([request.prompt_ids + sample.token_ids])
    with torch.no_grad():
        likeliest = models.first(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
    assert sample.token_ids == likeliest.tolist()


async def test_s27_an_update_in_flight_loses_nothing_and_labels_every_token(
    engine, models, publish
):
    await engine.load_weights(publish(1, models.first))
    second = publish(2, models.second)
    requests = [
        _request(f"flight-{i}", prompt_ids=[2, 20 + i, 21], max_tokens=MAX_RESPONSE, seed=i)
        for i in range(16)
    ]
    steps = (await engine.stats())["num_steps_total"]
    running = [asyncio.create_task(engine.generate(r)) for r in requests]
    await _until(engine, lambda s: s["num_steps_total"] >= steps + 60)
    loaded = await engine.load_weights(second)
    results = [samples[0] for samples in await asyncio.gather(*running)]

    assert (loaded.version, loaded.digest) == (2, second.digest)
    crossed = [s for s in results if len(s.version_spans) == 2]
    assert len(crossed) >= 8, "the update came too early or too late to be in flight"
    for request, sample in zip(requests, results, strict=True):
        assert sample.finish_reason in ("stop", "length")
        assert sample.version_spans[-1][2] == len(sample.token_ids)
        by_version = {1: models.first, 2: models.second}
        for version, start, end in sample.version_spans:
            expected = _expected_logprobs(by_version[version], request, sample)[start:end]
            assert np.abs(np.asarray(sample.logprobs)[start:end] - expected).max() < TOLERANCE
    for sample in crossed:
        assert [v for v, _, _ in sample.version_spans] == [1, 2]


async def test_s24_new_weights_are_live_tied_head_included_and_reported_by_digest(
    engine, models, publish
):
    first, second = publish(1, models.first), publish(2, models.second)
    loaded = [await engine.load_weights(v) for v in (first, second)]
    assert [(m.version, m.digest, m.num_tensors) for m in loaded] == [
        (v.version, v.digest, v.num_tensors) for v in (first, second)
    ]
    assert loaded[0].digest != loaded[1].digest
    request = _request("after-second")
    (sample,) = await engine.generate(request)
    assert sample.version_spans == [(2, 0, len(sample.token_ids))]
    assert _worst(models.second, request, sample) < TOLERANCE


async def test_s32_a_damaged_version_is_refused_and_the_old_weights_serve(engine, models, publish):
    await engine.load_weights(publish(1, models.first))
    version = publish(2, models.second)
    repair = _damage(version)

    with pytest.raises(WeightError, match="damaged"):
        await engine.load_weights(version)
    request = _request("old-weights")
    (sample,) = await engine.generate(request)
    assert sample.version_spans == [(1, 0, len(sample.token_ids))]
    assert _worst(models.first, request, sample) < TOLERANCE

    repair()
    assert (await engine.load_weights(version)).digest == version.digest
    (sample,) = await engine.generate(_request("new-weights"))
    assert _worst(models.second, request, sample) < TOLERANCE


async def test_s25_tensors_of_another_model_are_refused_by_name(engine, models, publish):
    name, tensor = "model.layers.1.mlp.up_proj.weight", torch.zeros(3, 3)
    cases = [
        ({name: None}, f"missing {name}"),
        ({"model.extra.weight": tensor}, "unknown model.extra.weight"),
        ({name: tensor}, rf"{name} has shape \[3, 3\], the model has \[336, 128\]"),
    ]
    for version, (changes, message) in enumerate(cases, start=10):
        with pytest.raises(WeightError, match=message):
            await engine.load_weights(publish(version, models.first, **changes))
    head = {"lm_head.weight": models.first.state_dict()["lm_head.weight"].clone()}
    assert (await engine.load_weights(publish(20, models.first, **head))).version == 20


async def test_a_cancelled_request_is_freed(engine):
    running = asyncio.create_task(
        engine.generate(_request("cancelled", num_samples=8, max_tokens=MAX_RESPONSE))
    )
    await _until(engine, lambda s: s["num_running"] == 8 and s["kv_cache_use_fraction"] > 0)
    running.cancel()
    freed = ("num_running", "num_waiting", "num_requests", "kv_cache_use_fraction")
    await _until(engine, lambda s: all(s[name] == 0 for name in freed))
    assert len(await engine.generate(_request("after-cancel"))) == 1


async def test_a_request_that_does_not_fit_fails_alone(engine):
    too_long = _request("too-long", prompt_ids=[2] * 400)
    fine = _request("fits")
    outcomes = await asyncio.gather(
        engine.generate(too_long), engine.generate(fine), return_exceptions=True
    )
    assert isinstance(outcomes[0], DataError)
    assert "too-long" in str(outcomes[0])
    assert isinstance(outcomes[1], list)


async def test_a_failing_step_reaches_everyone_who_waits(models):
    engine = engine_process.EngineProcess(_config(), str(models.folder))
    try:
        long = {"num_samples": 4, "max_tokens": MAX_RESPONSE}
        running = [asyncio.create_task(engine.generate(_request(f"{i}", **long))) for i in range(4)]
        await _until(engine, lambda s: s["num_steps_total"] > 0)
        await engine.break_step()
        outcomes = await asyncio.gather(*running, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [WorkerError] * 4
        assert all("a step went wrong" in str(outcome) for outcome in outcomes)
        for call in (engine.check(), engine.generate(_request("late"))):
            with pytest.raises(WorkerError, match="a step went wrong"):
                await call
    finally:
        engine.close()
