"""The real engine on CPU: which caches a request may start from, with `cache_on_update = "salt"`, and
at the end with `"keep"`.

The tests of "salt" share an engine, so each has version numbers of its own; the last one ends it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.errors import WorkerError
from rlhf_cluster.records import WeightVersion
from tests.support.builders import tiny_llama
from tests.support.builders.engine_models import (
    MAX_RESPONSE,
    TOLERANCE,
    Models,
    build_models,
    engine_config,
    expected_logprobs,
    make_request,
    until,
    worst,
)
from tests.support.engines import engine_process

BLOCK_SIZE = 32
MAX_RUNNING = 4
PROMPT = [2 + i % 60 for i in range(2 * BLOCK_SIZE + 6)]
"""Two whole blocks of the cache, and a rest that is computed every time."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("model"))


def start_engine(models: Models, cache_on_update: str) -> engine_process.EngineProcess:
    config = engine_config(
        data={"max_prompt_tokens": len(PROMPT)},
        generation={
            "cache_on_update": cache_on_update,
            "block_size": BLOCK_SIZE,
            "max_num_seqs": MAX_RUNNING,
        },
    )
    return engine_process.EngineProcess(config, str(models.folder))


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[engine_process.EngineProcess]:
    process = start_engine(models, "salt")
    yield process
    process.close()


@pytest.fixture
def keeping_engine(models: Models) -> Iterator[engine_process.EngineProcess]:
    process = start_engine(models, "keep")
    yield process
    process.close()


@pytest.fixture
def publish(tmp_path: Path) -> Callable[[int, Any], WeightVersion]:
    def publish(version: int, model: Any) -> WeightVersion:
        tensors = tiny_llama.checkpoint_tensors(model)
        return tiny_llama.publish(tmp_path / "weights", version, tensors)

    return publish


async def test_s27_no_request_meets_the_prefix_cache_of_another_version(engine, models, publish):
    for version, model in ((1, models.first), (2, models.second), (3, models.first)):
        await engine.load_weights(publish(version, model))
        for turn, expected_hits in enumerate((0, 2 * BLOCK_SIZE)):
            request = make_request(f"v{version}-{turn}", prompt_ids=PROMPT, seed=turn)
            before = await engine.stats()
            (sample,), num_cached = await engine.generate_counted(request)
            assert num_cached == expected_hits, (version, turn)
            after = await engine.stats()
            for name, number in (("prefix", len(PROMPT)), ("prefix_hit", expected_hits)):
                assert after[f"{name}_tokens_total"] - before[f"{name}_tokens_total"] == number
            assert worst(model, request, sample) < TOLERANCE


async def test_s27_requests_in_flight_keep_their_own_cache_and_new_ones_start_without_it(
    engine, models, publish
):
    await engine.load_weights(publish(4, models.first))
    old = make_request("old", prompt_ids=PROMPT, max_tokens=MAX_RESPONSE)
    steps = (await engine.stats())["num_steps_total"]
    running = asyncio.create_task(engine.generate(old))
    await until(engine, lambda s: s["num_steps_total"] >= steps + 40)
    await engine.load_weights(publish(5, models.second))
    new = make_request("new", prompt_ids=PROMPT, seed=12)
    (sample,), num_cached = await engine.generate_counted(new)
    assert num_cached == 0
    assert sample.version_spans == [(5, 0, len(sample.token_ids))]
    assert worst(models.second, new, sample) < TOLERANCE

    (survivor,) = await running
    assert survivor.finish_reason in ("stop", "length")
    (first, second) = survivor.version_spans
    assert (first[0], second[0], second[2]) == (4, 5, len(survivor.token_ids))
    found = np.asarray(survivor.logprobs)
    assert np.isfinite(found).all()
    before = np.abs(found - expected_logprobs(models.first, old, survivor))[: first[2]]
    after = np.abs(found - expected_logprobs(models.second, old, survivor))[second[1] :]
    assert before.max() < TOLERANCE
    assert after.mean() > 100 * TOLERANCE, "the old keys and values were computed again"


async def test_s27_requests_that_wait_during_an_update_start_without_the_old_cache(
    engine, models, publish
):
    await engine.load_weights(publish(6, models.first))
    first = make_request("first", prompt_ids=PROMPT, num_samples=MAX_RUNNING, max_tokens=200)
    queued = [make_request(f"queued-{i}", prompt_ids=PROMPT, seed=i) for i in range(3)]
    steps = (await engine.stats())["num_steps_total"]
    running = asyncio.create_task(engine.generate(first))
    await until(engine, lambda s: s["num_steps_total"] > steps)
    waiting = [asyncio.create_task(engine.generate_counted(request)) for request in queued]
    await until(engine, lambda s: s["num_waiting"] == len(queued))
    await engine.load_weights(publish(7, models.second))
    assert (await engine.stats())["num_requests"] == 1 + len(queued)
    assert len(await running) == MAX_RUNNING

    hits = []
    for request, ((sample,), num_cached) in zip(
        queued, await asyncio.gather(*waiting), strict=True
    ):
        hits.append(num_cached)
        assert sample.version_spans == [(7, 0, len(sample.token_ids))]
        assert worst(models.second, request, sample) < TOLERANCE
    assert hits[0] == 0, "the prompt was cached by the requests before the update alone"


async def test_a_version_that_is_published_anew_starts_without_the_cache_of_its_number(
    engine, models, tmp_path
):
    """After the loss of a learner its last versions are published again, with other weights."""
    for turn, model in enumerate((models.first, models.second)):
        root = tmp_path / str(turn)
        tensors = tiny_llama.checkpoint_tensors(model)
        await engine.load_weights(tiny_llama.publish(root, 8, tensors))
        request = make_request(f"anew-{turn}", prompt_ids=PROMPT, seed=turn)
        (sample,), num_cached = await engine.generate_counted(request)
        assert num_cached == 0
        assert worst(model, request, sample) < TOLERANCE


async def test_a_failing_step_reaches_everyone_who_waits(engine):
    long = {"num_samples": 4, "max_tokens": MAX_RESPONSE}
    running = [asyncio.create_task(engine.generate(make_request(f"{i}", **long))) for i in range(4)]
    await until(engine, lambda s: s["num_steps_total"] > 0)
    await engine.break_step()
    outcomes = await asyncio.gather(*running, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [WorkerError] * 4
    assert all("a step went wrong" in str(outcome) for outcome in outcomes)
    for call in (engine.check(), engine.generate(make_request("late"))):
        with pytest.raises(WorkerError, match="a step went wrong"):
            await call


async def test_s27_kept_caches_serve_all_requests_and_tokens_are_labelled_with_the_new_version(
    keeping_engine, models, publish
):
    engine = keeping_engine
    await engine.load_weights(publish(1, models.first))
    (sample,), num_cached = await engine.generate_counted(make_request("one", prompt_ids=PROMPT))
    assert num_cached == 0
    await engine.load_weights(publish(2, models.second))
    request = make_request("two", prompt_ids=PROMPT)
    (sample,), num_cached = await engine.generate_counted(request)
    assert num_cached == 2 * BLOCK_SIZE
    assert sample.version_spans == [(2, 0, len(sample.token_ids))]
    found = np.asarray(sample.logprobs)
    assert (
        np.abs(found - expected_logprobs(models.second, request, sample)).mean() > 100 * TOLERANCE
    )
    other = make_request("three", prompt_ids=[2, *reversed(PROMPT)])
    (sample,), num_cached = await engine.generate_counted(other)
    assert num_cached == 0
    assert worst(models.second, other, sample) < TOLERANCE, "the weights are the new ones"
