"""The real engine on CPU, against transformers: what it samples, and what an update does to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.errors import DataError, WeightError
from rlhf_cluster.generation.engine import (
    Engine,
    Sample,
)
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.records import Prompt, Rollout, RolloutGroup, Sampling, Ticket, WeightVersion
from tests.support.builders import tiny_llama
from tests.support.builders.engine_models import (
    MAX_RESPONSE,
    TOLERANCE,
    Models,
    build_models,
    check_damage_is_refused,
    engine_config,
    expected_logprobs,
    make_request,
    until,
    worst,
)
from tests.support.engines import engine_process


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[engine_process.EngineProcess]:
    process = engine_process.EngineProcess(engine_config(), str(models.folder))
    yield process
    process.close()


@pytest.fixture
def publish(tmp_path: Path) -> Callable[..., WeightVersion]:
    def publish(version: int, model: Any, **changes: Any) -> WeightVersion:
        tensors = tiny_llama.checkpoint_tensors(model) | changes
        kept = {name: t for name, t in tensors.items() if t is not None}
        return tiny_llama.publish(tmp_path / "weights", version, kept)

    return publish


@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_s12_logprobs_equal_the_learners_at_every_token(engine, models, publish, temperature):
    await engine.load_weights(publish(1, models.first))
    request = make_request(f"parity-{temperature}", temperature=temperature, num_samples=8)
    samples = await engine.generate(request)
    assert len(samples) == 8
    assert max(worst(models.first, request, s) for s in samples) < TOLERANCE


async def test_the_end_token_is_part_of_the_response_with_its_logprob(engine, models, publish):
    await engine.load_weights(publish(1, models.first))
    request = make_request("ends", num_samples=16, max_tokens=MAX_RESPONSE)
    samples = await engine.generate(request)
    stopped = [s for s in samples if s.finish_reason == "stop"]
    cut = [s for s in samples if s.finish_reason == "length"]
    assert stopped, "no sample ended by itself; the test needs a model that sometimes does"
    for sample in stopped:
        assert sample.token_ids[-1] == tiny_llama.END
        assert tiny_llama.END not in sample.token_ids[:-1]
        assert worst(models.first, request, sample) < TOLERANCE
    assert all(len(s.token_ids) == MAX_RESPONSE for s in cut)


async def test_s36_samples_differ_and_the_same_seed_repeats_them(engine):
    first, again, other = await asyncio.gather(
        engine.generate(make_request("seed-a", num_samples=8)),
        engine.generate(make_request("seed-b", num_samples=8)),
        engine.generate(make_request("seed-c", num_samples=8, seed=12345678901234567)),
    )
    assert len({tuple(s.token_ids) for s in first}) == 8
    assert [s.token_ids for s in first] == [s.token_ids for s in again]
    assert not {tuple(s.token_ids) for s in first} & {tuple(s.token_ids) for s in other}


async def test_temperature_zero_takes_the_likeliest_token(engine, models, publish):
    await engine.load_weights(publish(1, models.first))
    request = make_request("greedy", temperature=0.0)
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
        make_request(f"flight-{i}", prompt_ids=[2, 20 + i, 21], max_tokens=MAX_RESPONSE, seed=i)
        for i in range(16)
    ]
    steps = (await engine.stats())["num_steps_total"]
    running = [asyncio.create_task(engine.generate(r)) for r in requests]
    await until(engine, lambda s: s["num_steps_total"] >= steps + 60)
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
            expected = expected_logprobs(by_version[version], request, sample)[start:end]
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
    request = make_request("after-second")
    (sample,) = await engine.generate(request)
    assert sample.version_spans == [(2, 0, len(sample.token_ids))]
    assert worst(models.second, request, sample) < TOLERANCE


async def test_s32_a_damaged_version_is_refused_and_the_old_weights_serve(engine, models, publish):
    await check_damage_is_refused(engine, publish, models.first, models.second)


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
        engine.generate(make_request("cancelled", num_samples=8, max_tokens=MAX_RESPONSE))
    )
    await until(engine, lambda s: s["num_running"] == 8 and s["kv_cache_use_fraction"] > 0)
    running.cancel()
    freed = ("num_running", "num_waiting", "num_requests", "kv_cache_use_fraction")
    await until(engine, lambda s: all(s[name] == 0 for name in freed))
    assert len(await engine.generate(make_request("after-cancel"))) == 1


async def test_a_request_that_does_not_fit_fails_alone(engine):
    too_long = make_request("too-long", prompt_ids=[2] * 400)
    fine = make_request("fits")
    outcomes = await asyncio.gather(
        engine.generate(too_long), engine.generate(fine), return_exceptions=True
    )
    assert isinstance(outcomes[0], DataError)
    assert "too-long" in str(outcomes[0])
    assert isinstance(outcomes[1], list)


_borrowed: list[Any] = []


def borrow_engine(*_: Any) -> Engine:
    return _borrowed[-1]


async def _worker(engine: Any, **generation: Any) -> GenerationWorker:
    """A worker whose engine is the module's, which has been started."""

    class Borrowed:
        generate, load_weights = engine.generate, engine.load_weights

        async def start(self) -> None: ...

        def stats(self) -> dict[str, float]:
            return {"num_waiting": 0.0}

    _borrowed.append(Borrowed())
    config = engine_config(generation=generation)
    worker = GenerationWorker(config, "unused", "borrower", f"{__name__}:borrow_engine")
    await worker.start()
    return worker


async def _group(
    worker: GenerationWorker, updates: Sequence[WeightVersion] = (), **sampling: Any
) -> tuple[RolloutGroup, int]:
    """A group, and how many calls it took; before each but the first one of `updates` is pulled."""
    ids = np.array([2, 20, 21, 22], dtype=np.int32)
    prompt = Prompt(prompt_id="p", token_ids=ids, source="p")
    how, waiting, num_calls = Sampling(**sampling), iter(updates), 0
    group: Any = None
    while not isinstance(group, RolloutGroup):
        if num_calls and (version := next(waiting, None)) is not None:
            await worker.pull(version)
        _, group = await worker.generate(Ticket(number=1, version=1), prompt, how, group)
        num_calls += 1
    return group, num_calls


def _errors(model: Any, rollout: Rollout, span: slice = slice(None)) -> np.ndarray:
    request = make_request(
        "any", prompt_ids=rollout.prompt_ids.tolist(), temperature=rollout.temperature
    )
    sample = Sample(
        token_ids=rollout.response_ids.tolist(),
        logprobs=rollout.sampled_logprobs.tolist(),
        version_spans=[],
        finish_reason="length",
    )
    error = np.asarray(sample.logprobs) - expected_logprobs(model, request, sample)
    return np.abs(error[span])


async def test_a_group_in_segments_is_that_of_one_call_and_has_the_learners_logprobs(
    engine, models, publish
):
    await engine.load_weights(publish(1, models.first))
    whole, cut = await _worker(engine), await _worker(engine, segment_tokens=37)
    greedy = {"num_samples": 1, "temperature": 0.0, "max_tokens": 120}
    expected, num_calls = await _group(whole, **greedy)
    assert num_calls == 1
    found, num_calls = await _group(cut, **greedy)
    num_tokens = len(expected.rollouts[0].response_ids)
    assert num_calls == -(-num_tokens // 37) >= 3
    assert found.rollouts[0].response_ids.tolist() == expected.rollouts[0].response_ids.tolist()
    assert found.rollouts[0].finish_reason == expected.rollouts[0].finish_reason
    sampled, _ = await _group(
        cut, num_samples=8, temperature=0.7, max_tokens=120, greedy_baseline=True
    )
    assert sampled.greedy is not None
    assert sampled.greedy.response_ids.tolist() == expected.rollouts[0].response_ids.tolist()
    assert len({tuple(r.response_ids) for r in sampled.rollouts}) == 8
    for rollout in (*sampled.rollouts, sampled.greedy, found.rollouts[0]):
        assert _errors(models.first, rollout).max() < TOLERANCE


async def test_an_update_between_two_segments_labels_and_samples_what_follows(
    engine, models, publish
):
    first, second = publish(1, models.first), publish(2, models.second)
    await engine.load_weights(first)
    worker = await _worker(engine, segment_tokens=40)
    group, num_calls = await _group(
        worker, [second], num_samples=8, temperature=1.0, max_tokens=100
    )
    assert num_calls == 3
    crossed = [r for r in group.rollouts if len(r.response_ids) > 40]
    assert len(crossed) >= 4
    for rollout in crossed:
        assert set(rollout.versions[:40]) == {1}
        assert set(rollout.versions[40:]) == {2}
        assert _errors(models.first, rollout, slice(40)).max() < TOLERANCE
        assert _errors(models.second, rollout, slice(40, None)).max() < TOLERANCE
