"""Scoring is never on the learner's path: it waits for a pool that is too small, and for nothing else.

The real loop, buffer and worker pool; only the clock is not: the event loop jumps to its next timer.
"""

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.pipeline import Pipeline, StepTimes
from rlhf_cluster.records import Sampling
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from rlhf_cluster.weights.sync import WeightSync
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
    FakeObserver,
    FakePrompts,
    FakeScoring,
)
from tests.support.simulation.virtual_time import run_jumping

GROUPS, STEPS, SCALED_AT = 4, 40, 20
TRAIN_S, GENERATE_S, SCORE_S = 1.0, 0.25, 0.75


@dataclass
class PooledScoring(FakeScoring):
    """A worker takes one group at a time, and `SCORE_S` for it."""

    pool: WorkerPool = field(kw_only=True)

    async def score(self, group: Any) -> Any:
        async with self.pool.acquire():
            await asyncio.sleep(SCORE_S)
            return await super().score(group)


@dataclass
class Scaling(FakeObserver):
    """Keeps every step's times, and scales the pool to `wanted` after step `SCALED_AT`."""

    pool: WorkerPool = field(kw_only=True)
    wanted: int = field(kw_only=True)
    times: list[StepTimes] = field(default_factory=list)
    resizing: asyncio.Task[str] | None = None

    def step(self, report: Any, taken: Any, times: Any) -> None:
        super().step(report, taken, times)
        self.times.append(times)
        if report.step == SCALED_AT:
            self.resizing = asyncio.get_running_loop().create_task(self.pool.resize(self.wanted))


async def run(wanted: int) -> Scaling:
    clock = asyncio.get_running_loop().time

    async def launch(name: str) -> Worker:
        return Worker(name=name, actor=None, placement=None)

    async def check(worker: Worker) -> None:
        pass

    pool = WorkerPool(
        kind="scoring",
        launch=launch,
        retire=lambda worker: None,
        check=check,
        limits=PoolLimits(max_in_flight=1),
    )
    await pool.start(1)
    gate = AdmissionGate(max_staleness=2, pipeline_depth=2, groups_per_step=GROUPS, num_steps=STEPS)
    generation, learner = FakeGeneration(lambda _: GENERATE_S), FakeLearner(step_delay_s=TRAIN_S)
    buffer = BufferService(ExperienceBuffer(gate), 60.0, 0.05, clock)
    observer = Scaling(pool=pool, wanted=wanted)
    sync = WeightSync(learner, generation, buffer, 1, clock)
    await sync.after_step(0)
    await sync.drain(5)
    pipeline = Pipeline(
        generation=generation,
        scoring=PooledScoring(pool=pool),
        buffer=buffer,
        learner=learner,
        sync=sync,
        prompts=FakePrompts(),
        observer=observer,
        sampling=Sampling(num_samples=2, temperature=1.0, max_tokens=8),
        num_steps=STEPS,
        groups_per_step=GROUPS,
        max_error_rate=0.5,
        live_timeout_s=5,
        num_workers=lambda kind: len(pool.live) if kind == "scoring" else GROUPS,
        clock=clock,
    )
    assert await pipeline.run() == STEPS
    if observer.resizing is not None:
        await observer.resizing
    return observer


def simulated(wanted: int) -> list[StepTimes]:
    return run_jumping(run(wanted)).times


@pytest.mark.parametrize(("wanted", "waited_s"), [(1, 2.0), (2, 0.5), (3, 0.0), (6, 0.0)])
def test_a_slow_scorer_shows_in_the_learners_wait_and_scaling_the_pool_removes_it(wanted, waited_s):
    times = simulated(wanted)
    before, after = times[5:SCALED_AT], times[SCALED_AT + 8 : -3]
    # four groups of 0.75 s at one worker are 3 s, of which training hides 1 s
    assert [t.learner_wait_s for t in before] == [pytest.approx(GROUPS * SCORE_S - TRAIN_S)] * 15
    waits = [t.learner_wait_s for t in after]
    assert sum(waits) / len(waits) == pytest.approx(waited_s, abs=0.1)
    assert [t.train_s for t in times] == [pytest.approx(TRAIN_S)] * STEPS
    busy = [t.scoring_busy_s / t.step_s for t in after]
    assert sum(busy) / len(busy) == pytest.approx(min(1.0, GROUPS * SCORE_S / wanted), abs=0.1)
