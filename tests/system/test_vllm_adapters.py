"""The real engine on CPU with adapters that are served beside its weights."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.shards import ShardBase
from tests.support.builders.engine_models import (
    MAX_RESPONSE,
    TOLERANCE,
    Models,
    adapted,
    build_models,
    damage,
    engine_config,
    make_request,
    until,
    worst,
)
from tests.support.engines import engine_process

OTHER = 1.0
"""Under the error against another version's weights, at the token where it is largest. Measured: 5
to 10."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(models: Models) -> Iterator[engine_process.EngineProcess]:
    config = engine_config(
        generation={"lora": "served"},
        weights={"format": "adapter"},
        learner={"lora": {"rank": 4, "alpha": 0.12}},
    )
    process = engine_process.EngineProcess(config, str(models.folder))
    yield process
    process.close()


class Publisher:
    """Publishes the first model under random adapters, each version with its own."""

    def __init__(self, root: Path) -> None:
        self._root, self._base = root, None

    def __call__(self, number: int, model: Any, seed: int) -> tuple[WeightVersion, Any]:
        """The version, and the model that it stands for, merged in float32."""
        merged = copy.deepcopy(model)
        parts, base = adapted(model, seed, merged), self._base
        if base is not None:
            parts = [
                p for p in parts if p.scale is not None or p.name.endswith(lora_factors.TRAINED)
            ]
        report = store.write_shard(self._root, number, 0, parts, base=base)
        self._base = base or ShardBase(version=number, parts={})
        return store.commit(self._root, number, [report], keep=10), merged


async def test_a_served_adapter_has_the_logprobs_of_the_merged_model_and_the_next_one_its_own(
    engine, models, tmp_path
):
    """All requests share a prompt of two blocks, which the prefix cache holds."""
    publish = Publisher(tmp_path)
    prompt = [2, *range(20, 35)] * 4 + [5]
    merged = {}
    for number in (1, 2):
        version, merged[number] = publish(number, models.first, number)
        loaded = await engine.load_weights(version)
        assert (loaded.digest, loaded.num_tensors) == (version.digest, version.num_tensors)
        for again in range(2):
            request = make_request(f"v{number}-{again}", prompt_ids=prompt)
            (sample,), cached = await engine.generate_counted(request)
            assert (cached > 0) == bool(again), "another version's blocks, or none of its own"
            assert sample.version_spans == [(number, 0, len(sample.token_ids))]
            assert worst(merged[number], request, sample) < TOLERANCE
            assert (
                worst(merged[3 - number] if number > 1 else models.first, request, sample) > OTHER
            )


async def test_requests_in_flight_keep_the_adapter_that_they_began_with(engine, models, tmp_path):
    publish = Publisher(tmp_path)
    first, merged = publish(1, models.first, 11)
    await engine.load_weights(first)
    by_version, running, requests = {1: merged}, [], []
    for number in (2, 3, 4, 5):  # more than the engine holds at once
        steps = (await engine.stats())["num_steps_total"]
        for i in range(4):
            name = f"in-flight-{number}-{i}"
            request = make_request(name, prompt_ids=[2, 20 + i], max_tokens=MAX_RESPONSE, seed=i)
            requests.append(request)
            running.append(asyncio.create_task(engine.generate(request)))
        await until(engine, lambda s, steps=steps: s["num_steps_total"] >= steps + 20)
        version, by_version[number] = publish(number, models.first, 10 + number)
        await engine.load_weights(version)
    samples = [answer[0] for answer in await asyncio.gather(*running)]
    labels = []
    for request, sample in zip(requests, samples, strict=True):
        ((label, start, end),) = sample.version_spans
        labels.append(label)
        assert (start, end) == (0, len(sample.token_ids))
        assert worst(by_version[label], request, sample) < TOLERANCE
    assert len(set(labels)) >= 3, labels


async def test_a_damaged_adapter_is_refused_and_the_old_one_serves_on(engine, models, tmp_path):
    publish = Publisher(tmp_path)
    first, merged = publish(1, models.first, 21)
    await engine.load_weights(first)
    second, other = publish(2, models.first, 22)
    repair = damage(second)
    with pytest.raises(WeightError, match="damaged"):
        await engine.load_weights(second)
    request = make_request("after-damage")
    (sample,) = await engine.generate(request)
    assert worst(merged, request, sample) < TOLERANCE
    repair()
    await engine.load_weights(second)
    (sample,) = await engine.generate(request)
    assert worst(other, request, sample) < TOLERANCE


async def test_a_number_that_comes_again_with_other_weights_is_served_with_those(
    engine, models, tmp_path
):
    """As after the loss of a learner: the same version number, and blocks of the first in the cache."""
    prompt = [2, *range(20, 35)] * 4 + [6]
    for seed in (31, 32):
        version, merged = Publisher(tmp_path / str(seed))(1, models.first, seed)
        await engine.load_weights(version)
        request = make_request(f"again-{seed}", prompt_ids=prompt)
        (sample,) = await engine.generate(request)
        assert worst(merged, request, sample) < TOLERANCE


async def test_an_adapter_over_other_weights_than_the_folders_is_refused(engine, models, tmp_path):
    version, _ = Publisher(tmp_path)(1, models.second, 41)
    with pytest.raises(WeightError, match="added to another"):
        await engine.load_weights(version)
    request = replace(make_request("after-other-base"), max_tokens=4)
    (sample,) = await engine.generate(request)
    assert np.isfinite(sample.logprobs).all()
