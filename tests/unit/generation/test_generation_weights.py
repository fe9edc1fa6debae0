"""A worker never samples from weights that are not whole."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.errors import StalledError, WeightError, WorkerError
from rlhf_cluster.generation.engine import (
    Engine,
    LoadedWeights,
    Request,
    Sample,
    WeightGuard,
)
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.records import Prompt, RolloutGroup, Sampling, Ticket, WeightVersion
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import make_version

SAMPLING = Sampling(num_samples=1, temperature=1.0, max_tokens=4)
PROMPT = Prompt(prompt_id="p", token_ids=np.array([2, 3], dtype=np.int32), source="")
GOOD, GARBAGE = [5, 6], [9, 9]


class SleepyEngine(Engine):
    """Drops its weights before it loads others, as a sleep of level 2 does, and samples garbage
    from what is left, without a word. `behaviour` says how far the next load comes."""

    def __init__(self) -> None:
        self.behaviour = "load"
        self.dropped = False
        self.num_asked = 0
        self.go_on = asyncio.Event()  # a request waits for it
        self.go_on.set()
        self.asked, self.loading = asyncio.Event(), asyncio.Event()

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Sample]:
        self.num_asked += 1
        self.asked.set()
        await self.go_on.wait()
        ids = GARBAGE if self.dropped else GOOD
        return [
            Sample(
                token_ids=ids,
                logprobs=[-1.0] * len(ids),
                version_spans=[(0, 0, len(ids))],
                finish_reason="stop",
            )
        ]

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        if self.behaviour == "refuse":
            raise WeightError(f"version {version.version} is damaged")
        self.dropped = True
        self.loading.set()
        if self.behaviour == "break":
            raise RuntimeError("out of memory")
        if self.behaviour == "hang":
            await asyncio.Event().wait()
        self.dropped = self.behaviour == "other"
        return LoadedWeights(
            version=version.version,
            digest="another" if self.behaviour == "other" else version.digest,
            num_tensors=version.num_tensors,
            pause_s=0.0,
        )

    def stats(self) -> dict[str, float]:
        return {"num_waiting": 0.0}

    def check(self) -> None: ...

    async def close(self) -> None: ...


_engines: list[SleepyEngine] = []


def make_sleepy_engine(config: Any, model_dir: str, worker_name: str) -> SleepyEngine:
    _engines.append(SleepyEngine())
    return _engines[-1]


async def _worker() -> tuple[GenerationWorker, SleepyEngine]:
    config = tiny_config(generation={"pull_timeout_s": 0.05})
    worker = GenerationWorker(config, "unused", "sleepy-0", f"{__name__}:make_sleepy_engine")
    await worker.start()
    return worker, _engines[-1]


async def _tokens(worker: GenerationWorker, number: int = 0) -> list[int]:
    _, group = await worker.generate(Ticket(number=number, version=0), PROMPT, SAMPLING)
    assert isinstance(group, RolloutGroup)
    return group.rollouts[0].response_ids.tolist()


async def _pull_and_lose(worker: GenerationWorker, engine: SleepyEngine, behaviour: str) -> None:
    engine.behaviour = "hang" if behaviour == "cancel" else behaviour
    engine.loading.clear()
    error = {"break": RuntimeError, "hang": StalledError, "other": WeightError}
    pull = asyncio.create_task(worker.pull(make_version(2)))
    if behaviour == "cancel":
        await engine.loading.wait()
        pull.cancel()
    with pytest.raises(error.get(behaviour, asyncio.CancelledError)):
        await pull


@pytest.mark.parametrize("behaviour", ["break", "hang", "other", "cancel"])
async def test_s28_weights_that_were_dropped_sample_nothing_until_a_whole_version_is_loaded(
    behaviour,
):
    worker, engine = await _worker()
    await worker.pull(make_version(1))
    assert await _tokens(worker) == GOOD
    await _pull_and_lose(worker, engine, behaviour)
    asked = engine.num_asked
    for call in (worker.health, lambda: _tokens(worker, 1)):
        with pytest.raises(WorkerError, match="sleepy-0: its weights are lost .*version 2"):
            await call()
    engine.behaviour = "refuse"
    with pytest.raises(WeightError, match="damaged"):
        await worker.pull(make_version(3))
    with pytest.raises(WorkerError, match="Pull one, or replace the worker"):
        await _tokens(worker, 2)
    assert engine.num_asked == asked, "the engine was asked to sample from lost weights"

    engine.behaviour = "load"
    await worker.pull(make_version(4))
    assert (await worker.health())["version"] == 4
    assert await _tokens(worker, 3) == GOOD


@pytest.mark.parametrize("reloaded", [False, True])
async def test_s28_what_was_being_sampled_when_the_weights_were_lost_never_becomes_a_group(
    reloaded,
):
    """Also when whole weights are back before its last token: those in between were garbage."""
    worker, engine = await _worker()
    await worker.pull(make_version(1))
    engine.go_on.clear()
    engine.asked.clear()
    running = asyncio.create_task(_tokens(worker))
    await engine.asked.wait()
    await _pull_and_lose(worker, engine, "break")
    if reloaded:
        engine.behaviour = "load"
        await worker.pull(make_version(3))
    engine.go_on.set()
    with pytest.raises(WorkerError, match="lost .*RuntimeError out of memory"):
        await running


async def test_s32_a_version_that_is_refused_whole_costs_the_old_weights_nothing():
    worker, engine = await _worker()
    await worker.pull(make_version(1))
    engine.go_on.clear()
    engine.asked.clear()
    running = asyncio.create_task(_tokens(worker))
    await engine.asked.wait()
    engine.behaviour = "refuse"
    with pytest.raises(WeightError, match="damaged"):
        await worker.pull(make_version(2))
    engine.go_on.set()
    assert await running == GOOD
    assert (await worker.health())["version"] == 1


def test_s28_the_guard_tells_lost_from_lost_meanwhile():
    guard = WeightGuard("w")
    first = guard.check()
    guard.lose("half a version")
    with pytest.raises(WorkerError, match="w: its weights are lost \\(half a version\\)"):
        guard.check()
    guard.restore()
    with pytest.raises(WorkerError, match="lost while it sampled \\(half a version\\)"):
        guard.check(first)
    assert guard.check(guard.check()) == 1
