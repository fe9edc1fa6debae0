"""The real loop, buffer and checkpoints with fakes around them, killed wherever a test says.

`attempt` is one process of a run: it goes on from what is on disk and on nothing else. It dies at
its `kill_at`-th event, an event being the start or the end of any call to a service; after that every
call fails, as in a process that is gone. Scored groups are stored; the objects of some are lost
before the learner gets them.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.group_recovery import Recovery
from rlhf_cluster.buffer.group_store import (
    ExperienceStore,
    collect,
)
from rlhf_cluster.buffer.replay_pool import ReplayPool
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import ScoringError
from rlhf_cluster.pipeline import Pipeline
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    LearnerState,
    RolloutGroup,
    Sampling,
    StepReport,
    TrainingGroup,
)
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.checkpoint.checkpoint_folder import (
    Checkpoint,
    newest,
)
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.sections.rl_run import Replay
from rlhf_cluster.weights.sync import WeightSync
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
    FakeObserver,
    FakePrompts,
    FakeScoring,
)

FIRST_PROMPT = 100


class Killed(Exception):
    """The process is gone."""


@dataclass
class Fuse:
    """Counts events; burnt from the `kill_at`-th on."""

    kill_at: int | None = None
    events: int = 0

    def event(self) -> None:
        self.events += 1
        if self.kill_at is not None and self.events >= self.kill_at:
            raise Killed(f"at event {self.events}")


class Fused:
    """A service whose calls are events."""

    def __init__(self, service: Any, fuse: Fuse) -> None:
        self._service, self._fuse = service, fuse

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._service, name)

        async def call(*arguments: Any, **named: Any) -> Any:
            self._fuse.event()
            result = await method(*arguments, **named)
            self._fuse.event()
            return result

        return call


@dataclass
class LedgerLearner(FakeLearner):
    """Its weights are the list of what it was trained on: (step, ticket, prompt, staleness)."""

    ledger: list[list[Any]] = field(default_factory=list)
    store: ExperienceStore | None = None
    copied: str = ""
    before_step: Callable[[], Awaitable[None]] | None = None

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        if self.before_step is not None:
            await self.before_step()
        wanted = [(g.ticket.number, g.handle) for g in groups]
        found = collect(wanted, _fetch, self.store)
        for group in found:
            oldest = group.summary().oldest_version
            row = [self.version, group.ticket.number, group.prompt.prompt_id, self.version - oldest]
            self.ledger.append(row)
        self.train(found)
        return await super().train_step(groups)

    def train(self, groups: Sequence[ExperienceGroup]) -> None:
        """What a step does beside the ledger."""

    def load(self, checkpoint: Checkpoint) -> None:
        text = (checkpoint.folder / "learner" / "ledger.json").read_text()
        self.ledger, self.version = json.loads(text), checkpoint.state.step

    async def copy_state(self) -> LearnerState:
        self.copied = json.dumps(self.ledger)
        return LearnerState(version=self.version, num_bytes=8, skips={}, algorithm={})

    async def write_state(self, folder: Path) -> None:
        self._write(folder)

    def _write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "ledger.json").write_text(self.copied)


def _fetch(handles: Sequence[ExperienceGroup]) -> list[ExperienceGroup | None]:
    return [None if handle.ticket.number % 3 == 1 else handle for handle in handles]


@dataclass
class StoringScoring(FakeScoring):
    """`written` has oldest and newest version of every group that is on disk, or was."""

    store: ExperienceStore | None = None
    written: dict[int, tuple[int, int]] = field(default_factory=dict)

    async def score(self, group: RolloutGroup) -> tuple[ExperienceGroup, GroupSummary]:
        experience, summary = await super().score(group)
        assert self.store is not None
        self.store.write(experience)
        versions = [int(v) for r in group.rollouts for v in r.versions]
        self.written[group.ticket.number] = (min(versions), max(versions))
        return experience, summary


@dataclass(kw_only=True)
class Attempt:
    """One process of the run in `root`, with `gate` and a checkpoint every `every` steps.

    Of the groups that `discarded` names, those with an odd number fail, and the algorithm has no use
    for the others. `written` is shared by the attempts of one run.
    """

    root: Path
    gate: AdmissionGate
    every: int
    discarded: Callable[[int], bool] = lambda number: False
    kill_at: int | None = None
    slow_steps: bool = True  # a step takes as long as writing a checkpoint
    group_size: int = 1
    replay: Replay | None = None
    num_replayed: int = 2  # groups of a step, with `replay`
    written: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fuse = Fuse(self.kill_at)
        self.store = ExperienceStore(self.root / "experience")
        self.learner, self.observer = self.new_learner(), FakeObserver()
        self.checkpoints: Checkpoints | None = None
        self.checkpoint = newest(self.root).checkpoint
        state = self.checkpoint.state if self.checkpoint else None
        pool = None
        if self.replay is not None:
            pool = ReplayPool(self.replay, self.num_replayed, 7, self.gate.max_staleness)
        buffer = ExperienceBuffer(self.gate, replay=pool)
        if self.checkpoint is not None and state is not None:
            self.learner.load(self.checkpoint)
            buffer = ExperienceBuffer.resume(self.gate, state.buffer, pool)
        self.state = state
        step = state.step if state else None
        self.recovery = Recovery(
            self.store,
            self.root,
            every=self.every,
            span=self.gate.bound + 3,
            look_ahead=self.gate.look_ahead,
            keep_steps=0,
            step=step,
            tell=self.observer.event,
            max_uses=1 if self.replay is None else self.replay.max_uses,
            reuse_steps=0 if self.replay is None else self.gate.max_staleness,
        )
        self.recovery.rewind()
        rewound = -1 if step is None else step
        for number in [n for n, (_, last) in self.written.items() if last > rewound]:
            del self.written[number]
        self.stored_before = dict(self.written)
        self.buffer = BufferService(buffer, 30.0, 0.05, time.monotonic)

    async def build(self) -> Pipeline:
        learner, buffer = Fused(self.learner, self.fuse), Fused(self.buffer, self.fuse)
        self.generation = self.new_generation()
        generation = Fused(self.generation, self.fuse)
        self.scoring = StoringScoring(
            fail=self._fail, rewards=self.rewards, store=self.store, written=self.written
        )
        self.sync = WeightSync(learner, generation, buffer, 1, time.monotonic)
        first_step = self.state.step if self.state else 0
        await self.sync.publish_last(first_step, 5)
        self.checkpoints = Checkpoints(
            root=self.root,
            every=self.every,
            keep=2,
            num_steps=self.gate.num_steps,
            learner=learner,
            cut=self.cut,
            tell=self.observer.event,
            clock=time.monotonic,
            timeout_s=30,
        )
        self.checkpoints.stats.last = first_step if self.state else -1
        if self.slow_steps:
            self.learner.before_step = self.checkpoints.drain
        return Pipeline(
            generation=generation,
            scoring=Fused(self.scoring, self.fuse),
            buffer=buffer,
            learner=learner,
            sync=self.sync,
            prompts=FakePrompts(),
            observer=self.observer,
            sampling=Sampling(num_samples=self.group_size, temperature=1.0, max_tokens=8),
            num_steps=self.gate.num_steps,
            groups_per_step=self.gate.groups_per_step,
            max_error_rate=1.0,
            live_timeout_s=5,
            trains_on=lambda rewards: rewards[0] > 0,
            checkpoints=self.checkpoints,
            recovery=self.recovery,
            first_step=first_step,
            first_prompt=self.state.first_prompt if self.state else FIRST_PROMPT,
            open=self.state.buffer.open if self.state else (),
            replayable=self.state.buffer.replayable if self.state else (),
        )

    def run(self) -> bool:
        """Whether it came to its end, not killed. Its threads are gone when this returns."""
        return asyncio.run(self._run())

    async def _run(self) -> bool:
        try:
            await (await self.build()).run()
        except Killed:
            background = [self.sync._running, self.checkpoints and self.checkpoints._running]
            await asyncio.gather(*filter(None, background), return_exceptions=True)
            return False
        return True

    async def cut(self, step: int, learner: LearnerState) -> RunState:
        self.fuse.event()
        return RunState(
            step=step,
            learner=learner,
            buffer=await self.buffer.state(step),
            live_version=self.sync.stats.live,
            publishes_skipped=self.sync.stats.skipped,
            depth=None,
            first_prompt=FIRST_PROMPT,
            reference=None,
            reward_before=None,
            packages={},
        )

    def _fail(self, group: Any) -> ScoringError | None:
        number = group.ticket.number
        fails = self.discarded(number) and number % 2
        return ScoringError(f"group {number} fails") if fails else None

    def new_learner(self) -> LedgerLearner:
        return LedgerLearner(store=self.store)

    def new_generation(self) -> FakeGeneration:
        return FakeGeneration()

    def rewards(self, group: RolloutGroup) -> list[float]:
        """Apart by what the ticket says, from the second on."""
        if self.discarded(group.ticket.number):
            return [0.0] * len(group.rollouts)
        return [1.0 + i * (group.ticket.number % 4) for i in range(len(group.rollouts))]
