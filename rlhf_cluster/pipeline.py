"""The training loop: generation, scoring and training overlapped.

      prompts                                publish (overlapped with the next step)
         |  admit                           +---------------------------------+
         v                                  v                                 |
     GENERATION --rollouts--> SCORING --groups--> BUFFER --batches--> LEARNER-+
         ^                                                               |
         +------------------------ pull, in flight ----------------------+  weights/sync.py

Two loops (`rollout_loop`, `learner_loop`) and one background task (`sync`). Two steps in time, where
step k turns version k - 1 into version k:

    time ->       | step k                                   | step k + 1
    learner_loop  | take | train_step        | copy | record | take | train_step        | copy |
    sync            write, pull k - 1 | live        | write k, pull k           | live         |
    rollout_loop         | admit      | admit                       | admit     | admit
    produce         each group is generated, scored and finished on its own, during all of the above

    wait                    for what                                unblocked by
    learner_loop: take      `groups_per_step` finished groups       `produce` (`buffer.finish`)
    learner_loop: copy      a copy of the weights, not the write    the learner
    learner_loop: record    metrics, stored numbers, a copy for     the disk, the learner
                            the checkpoint, not its write
    sync: write, pull       the store, then all workers             the learner, the workers
    rollout_loop: admit     a free slot in the buffer               `take`, or a version that is live

No loop waits for a publish. If one still runs at the next copy, that version is skipped and counted.
Backpressure runs against the arrows: the learner's progress and the live version free slots, and a
slot admits a group. With `max_staleness = 0` the same code is synchronous: no slot is free until the
weights of the last step are live.

Promises: every admitted group is finished or discarded with a counted reason; every wait has a
deadline (each port its own); the first failure ends all loops and is raised to the caller.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlhf_cluster.buffer.adaptive_depth import DepthController
from rlhf_cluster.buffer.buffer_service import ask_until_answered
from rlhf_cluster.errors import RecordLost, RlhfError, first_failure
from rlhf_cluster.failures import ErrorRate, is_group_failure
from rlhf_cluster.observe.occupancy import Occupancy
from rlhf_cluster.ports import BufferPort, GenerationPort, LearnerPort, RecoveryPort, ScoringPort
from rlhf_cluster.records import (
    GroupSummary,
    Handle,
    Prompt,
    Sampling,
    StepReport,
    Ticket,
    TrainingGroup,
)
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.util.waiting import gather_or_cancel
from rlhf_cluster.weights.sync import WeightSync

NO_SIGNAL = "no_signal"
"""Discard reason of a group whose rewards give the algorithm no learning signal."""
MAX_READS = 32
"""Bound of concurrent reads of stored groups, and of groups per read.

A run may resume with thousands, and each read has a deadline.
"""
MAX_REGENERATIONS = 3
"""Times that a group is generated again when a node failure loses it before it is scored."""


class PromptsPort(Protocol):
    """Stream of prompts; a prompt is a function of its index alone."""

    def next(self) -> Prompt: ...

    def seek(self, cursor: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Wall time of one step by what it was spent on, in seconds."""

    step_s: float
    learner_wait_s: float  # the learner waited for groups
    generation_wait_s: float  # no group was in flight: generation waited for a free slot
    train_s: float
    publish_wait_s: float  # the learner waited for the copy of its weights
    generation_busy_s: float  # time with a group in flight, mean over the workers
    scoring_busy_s: float  # time with a group in flight, mean over the scoring workers
    pool_busy_s: Mapping[str, float] = field(default_factory=dict)  # of other scoring pools


class ObserverPort(Protocol):
    """Receiver of what happened: each step, and groups that did not take the usual way."""

    def step(
        self, report: StepReport, taken: Sequence[TrainingGroup], times: StepTimes
    ) -> None: ...

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None: ...

    def group_recovered(self, ticket: Ticket) -> None: ...

    def event(self, text: str) -> None: ...


class CheckpointsPort(Protocol):
    """Checkpoints of the run, written in the background after a copy between two steps."""

    async def after_step(self, step: int) -> None: ...

    async def save_now(self, step: int, timeout_s: float) -> None: ...

    async def drain(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """Services of one run, and the numbers that its loops need.

    A resumed run begins with `first_step` steps done and the groups of `open` in flight again; a group
    that `recovery` has stored is finished at once. Ticket n always gets the prompt at index
    `first_prompt` + n of the stream. `groups_per_step` counts the fresh groups of a step, without
    replayed ones.
    """

    generation: GenerationPort
    scoring: ScoringPort
    buffer: BufferPort
    learner: LearnerPort
    sync: WeightSync
    prompts: PromptsPort
    observer: ObserverPort
    sampling: Sampling
    num_steps: int
    groups_per_step: int
    max_error_rate: float
    live_timeout_s: float
    trains_on: Callable[[Sequence[float]], bool] = lambda rewards: True
    depth: DepthController | None = None  # None: a constant pipeline depth
    checkpoints: CheckpointsPort | None = None
    recovery: RecoveryPort | None = None  # None: no group is stored on disk
    trainable: Callable[[Ticket, int], bool] = lambda ticket, oldest_version: True
    """Whether a stored group with tokens of that version is fresh enough at its turn."""
    on_disk: Callable[..., Awaitable[Any]] = (
        run_in_thread  # runs a blocking method of `recovery` in a thread
    )
    first_step: int = 0
    first_prompt: int = 0
    open: Sequence[Ticket] = ()
    replayable: Sequence[int] = ()  # trained groups that a resumed run may train again
    stopped: bool = False  # set by `stop`
    num_workers: Callable[[str], int] = lambda pool: 1  # live workers of "generation" or "scoring"
    pool_busy: Callable[[], Mapping[str, float]] = dict
    """Busy seconds of each further scoring pool since the last call."""
    clock: Callable[[], float] = time.monotonic
    _reads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_READS))
    _outcomes: ErrorRate = field(init=False)
    _generating: Occupancy = field(init=False)
    _being_scored: Occupancy = field(init=False)

    def __post_init__(self) -> None:
        self._outcomes = ErrorRate(self.max_error_rate)
        self._generating = Occupancy(self.clock, lambda: self.num_workers("generation"))
        self._being_scored = Occupancy(self.clock, lambda: self.num_workers("scoring"))

    async def run(self) -> int:
        """Train up to step `num_steps`; return the number of steps done, fewer after `stop`.

        Version `first_step` must be live. Raises the first failure of any loop.
        """
        self._generating.start()
        self._being_scored.start()
        self.pool_busy()
        try:
            async with asyncio.TaskGroup() as loops:
                watch = loops.create_task(self.sync.run_until_cancelled(check_every_s=0.5))
                rollouts = loops.create_task(self.rollout_loop())
                done = await self.learner_loop()
                if self.stopped:
                    rollouts.cancel()
                else:
                    await rollouts
                    await self.sync.drain(self.live_timeout_s)
                    if self.checkpoints is not None:
                        await self.checkpoints.drain()
                watch.cancel()  # the task group waits for it, and it never ends by itself
                return done
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures

    async def rollout_loop(self) -> None:
        """Admit groups and start `produce` for each; consumes prompts.

        Waits for: a free slot. Unblocked by: `learner_loop` taking groups, a version becoming live.
        Ends when the buffer needs no further group.
        """
        async with asyncio.TaskGroup() as groups:
            attempt = 0 if self.recovery is None else self.recovery.attempt
            tickets: Sequence[Ticket] = self.open
            while tickets := tickets or await ask_until_answered(self.buffer.admit):
                for ticket in tickets:
                    self.prompts.seek(self.first_prompt + ticket.number)
                    ticket = replace(ticket, attempt=attempt)
                    groups.create_task(self.produce(ticket, self.prompts.next()))
                tickets = []

    async def stop(self) -> None:
        """End `run` at the next boundary between two steps: at once if the learner waits for groups."""
        self.stopped = True
        await self.buffer.stop()

    async def produce(self, ticket: Ticket, prompt: Prompt) -> None:
        """Bring one group into the buffer: recover it from disk, or generate and score it.

        A group that failed after all retries, or that the algorithm does not train on, is discarded
        and another admitted. `rlhf_cluster.failures` says which errors end the run instead.
        """
        try:
            stored = await self._recover(ticket, prompt)
            handle, summary = stored or await self._generate_and_score(ticket, prompt)
        except RlhfError as error:
            if not is_group_failure(error):
                raise
            self.observer.group_discarded(ticket, error)
            await self.buffer.discard(ticket, type(error).__name__)
            # It raises at too many errors, so the discard is counted first.
            self._outcomes.add(error)
        else:
            if self.trains_on(summary.rewards):
                group = TrainingGroup(ticket=ticket, handle=handle, summary=summary)
                await self.buffer.finish(group)
            else:
                await self.buffer.discard(ticket, NO_SIGNAL)
            self._outcomes.add(None)

    async def _recover(self, ticket: Ticket, prompt: Prompt) -> tuple[Handle, GroupSummary] | None:
        if self.recovery is None:
            return None
        async with self._reads:
            stored = await self.on_disk(self.recovery.recover, ticket, prompt)
        if stored is None or not self.trainable(ticket, stored[1].oldest_version):
            return None  # it is generated again, with the current weights
        self.observer.group_recovered(ticket)
        return stored

    async def _generate_and_score(
        self, ticket: Ticket, prompt: Prompt
    ) -> tuple[Handle, GroupSummary]:
        async def generate() -> Handle:
            with self._generating.call():
                return await self.generation.generate(ticket, prompt, self.sampling)

        async def score(rollouts: Handle) -> tuple[Handle, GroupSummary]:
            with self._being_scored.call():
                return await self.scoring.score(rollouts)

        return await generate_and_score(generate, score)

    async def learner_loop(self) -> int:
        """Train on batches; return the number of steps done.

        Waits for: `groups_per_step` finished groups. Unblocked by: `rollout_loop`, `stop`, or the
        buffer's stall deadline.
        """
        if self.recovery is not None and self.replayable:
            await self.buffer.exclude_from_replay(await self._unusable_replays(self.recovery))
        for version in range(self.first_step, self.num_steps):
            start = self.clock()
            taken = await ask_until_answered(self.buffer.take, self.groups_per_step, version)
            if not taken:
                return version
            got = self.clock()
            report = await self.learner.train_step(taken)
            trained = self.clock()
            await self.sync.after_step(report.step)  # waits for the copy, not for the publish
            await self._record(report, taken, self._step_times(start, got, trained, self.clock()))
        return self.num_steps

    def _step_times(self, start: float, got: float, trained: float, end: float) -> StepTimes:
        generation, scoring = self._generating.take(), self._being_scored.take()
        busy = {"scoring": scoring.busy_s, **self.pool_busy()}
        return StepTimes(
            step_s=end - start,
            learner_wait_s=got - start,
            generation_wait_s=generation.idle_s,
            train_s=trained - got,
            publish_wait_s=end - trained,
            generation_busy_s=generation.busy_s,
            scoring_busy_s=busy.pop("scoring"),
            pool_busy_s=busy,
        )

    async def _record(
        self, report: StepReport, taken: Sequence[TrainingGroup], times: StepTimes
    ) -> None:
        """Report a step, adapt the depth, and store what a resumed run needs, in this order."""
        self.observer.step(self._with_depth(report), taken, times)
        await self._adapt_depth(report, times)
        if self.recovery is not None:
            numbers = [group.ticket.number for group in taken]
            await self.on_disk(self.recovery.record_trained, report.step, numbers)
        # last, so that the checkpoint of a step has the depth that the step chose
        if self.checkpoints is not None:
            await self.checkpoints.after_step(report.step)

    async def _unusable_replays(self, recovery: RecoveryPort) -> list[int]:
        """Return those of `replayable` that cannot be trained again. Waits for: reading them all."""

        async def read(numbers: Sequence[int]) -> list[int]:
            async with self._reads:
                return await self.on_disk(recovery.find_unusable, numbers)

        numbers = self.replayable
        chunks = [numbers[at : at + MAX_READS] for at in range(0, len(numbers), MAX_READS)]
        return [number for chunk in await gather_or_cancel(map(read, chunks)) for number in chunk]

    def _with_depth(self, report: StepReport) -> StepReport:
        if self.depth is None:
            return report
        depth = {"staleness/pipeline_depth": float(self.depth.depth)}
        return replace(report, metrics={**report.metrics, **depth})

    async def _adapt_depth(self, report: StepReport, times: StepTimes) -> None:
        if self.depth is None:
            return
        share = times.learner_wait_s / times.step_s if times.step_s > 0 else 0.0
        size = report.metrics.get("importance/effective_sample_size")
        change = self.depth.step(size, share)
        if change is not None:
            await self.buffer.set_pipeline_depth(change.depth)
            self.observer.event(str(change))


async def generate_and_score(
    generate: Callable[[], Awaitable[Handle]],
    score: Callable[[Handle], Awaitable[tuple[Handle, GroupSummary]]],
) -> tuple[Handle, GroupSummary]:
    """Generate a group, then score it.

    If a node failure loses the rollouts before they are scored, generate them again, at most
    `MAX_REGENERATIONS` times.
    """
    for _ in range(MAX_REGENERATIONS):
        try:
            return await score(await generate())
        except RecordLost:
            continue
    return await score(await generate())
