"""The whole loop in one file.

      prompts                                     publish (behind the next step)
         |  admit                           +---------------------------------+
         v                                  v                                 |
     GENERATION --rollouts--> SCORING --groups--> BUFFER --batches--> LEARNER-+
         ^                                                               |
         +------------------------ pull, in flight ----------------------+  weights/sync.py

Two loops and one background task. Backpressure runs against the arrows: the learner's progress and
the live version free slots, slots admit groups. `max_staleness = 0` is the synchronous mode of this
same code: then no slot is free until the last step's weights are live.

Promises: every admitted group is finished or discarded with a counted reason; no wait is without a
deadline (each port has its own); the first failure ends all loops and is what the caller sees.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from rlhf_cluster.buffer.adaptive_depth import DepthController
from rlhf_cluster.errors import (
    RecordLost,
    RlhfError,
    WorkerError,
    first_failure,
)
from rlhf_cluster.failures import Outcomes, costs_one_group
from rlhf_cluster.observe.occupancy import Occupancy
from rlhf_cluster.ports import (
    BufferPort,
    GenerationPort,
    LearnerPort,
    RecoveryPort,
    ScoringPort,
)
from rlhf_cluster.records import (
    GroupSummary,
    Handle,
    Prompt,
    Sampling,
    StepReport,
    Taken,
    Ticket,
)
from rlhf_cluster.util.concurrency import together
from rlhf_cluster.util.slow_disk import aside
from rlhf_cluster.weights.sync import WeightSync

NO_SIGNAL = "no_signal"
"""The reason of a discard whose rewards the algorithm has no use for."""
MAX_READS = 32
"""Stored groups that are read at once, and that one look takes at most: a run may resume with
thousands, and each look has a deadline."""
MAX_LOSSES = 3
"""How often a group is generated again that a node took with it before it was scored."""


class PromptsPort(Protocol):
    def next(self) -> Prompt: ...

    def seek(self, cursor: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Where one step's wall time went, in seconds."""

    step_s: float
    learner_wait_s: float  # the learner waited for groups
    generation_wait_s: float  # no group was under way: generation waited for a free slot
    train_s: float
    publish_wait_s: float  # the learner waited for the copy of its weights
    generation_busy_s: float  # mean over the workers of the time they had a group
    scoring_busy_s: float  # the same of the scoring workers
    pool_busy_s: Mapping[str, float] = field(default_factory=dict)  # of other pools that score


class ObserverPort(Protocol):
    def step(self, report: StepReport, taken: Sequence[Taken], times: StepTimes) -> None: ...

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None: ...

    def group_recovered(self, ticket: Ticket) -> None: ...

    def event(self, text: str) -> None: ...


class CheckpointsPort(Protocol):
    async def after_step(self, step: int) -> None: ...

    async def save_now(self, step: int, timeout_s: float) -> None: ...

    async def drain(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """The services of one run and the few numbers that the loops need.

    A run that goes on from a checkpoint begins with `first_step` steps done and the groups of `open`
    under way again; one that `recovery` has is finished at once. Ticket n gets the prompt at place
    `first_prompt` + n of the stream, always. `groups_per_step` counts the fresh groups of a step: all
    of them, without replay.
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
    depth: DepthController | None = None  # None: the depth stays as it is
    checkpoints: CheckpointsPort | None = None
    recovery: RecoveryPort | None = None  # None: no group is on disk
    trainable: Callable[[Ticket, int], bool] = lambda ticket, oldest_version: True
    """Whether a stored group with tokens of that version keeps the bound when its turn comes."""
    on_disk: Callable[..., Awaitable[Any]] = aside  # how its methods are called
    first_step: int = 0
    first_prompt: int = 0
    open: Sequence[Ticket] = ()
    replayable: Sequence[int] = ()  # trained groups that a resumed run may train again
    stopped: bool = False  # by `stop`
    num_workers: Callable[[str], int] = lambda pool: 1  # of "generation", "scoring"
    pool_busy: Callable[[], Mapping[str, float]] = dict
    """Seconds since the last call for which each pool was busy, where several pools score."""
    clock: Callable[[], float] = time.monotonic
    _reads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_READS))
    _outcomes: Outcomes = field(init=False)
    _generating: Occupancy = field(init=False)
    _being_scored: Occupancy = field(init=False)

    def __post_init__(self) -> None:
        self._outcomes = Outcomes(self.max_error_rate)
        self._generating = Occupancy(self.clock, lambda: self.num_workers("generation"))
        self._being_scored = Occupancy(self.clock, lambda: self.num_workers("scoring"))

    async def run(self) -> int:
        """Train up to step `num_steps`; returns the steps done, fewer after `stop`.

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
                watch.cancel()
                return done
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures

    async def rollout_loop(self) -> None:
        """Consumes prompts, produces finished groups.

        Waits for: a slot. Unblocked by: `learner_loop` taking groups, a version getting live.
        Ends when the buffer needs no further group.
        """
        async with asyncio.TaskGroup() as groups:
            attempt = 0 if self.recovery is None else self.recovery.attempt
            tickets = list(self.open)
            while tickets := tickets or await self.buffer.admit():
                for ticket in tickets:
                    self.prompts.seek(self.first_prompt + ticket.number)
                    ours = replace(ticket, attempt=attempt)
                    groups.create_task(self.produce(ours, self.prompts.next()))
                tickets = []

    async def stop(self) -> None:
        """End `run` at the next boundary between two steps: now, where the learner waits."""
        self.stopped = True
        await self.buffer.stop()

    async def produce(self, ticket: Ticket, prompt: Prompt) -> None:
        """One group from ticket to buffer. A failure that outlived its retries is a discard, and so
        is a group that the algorithm does not train on; another one is admitted in its place. Which
        errors end the run instead: `rlhf_cluster.failures`."""
        try:
            found = await self._recovered(ticket, prompt)
            handle, summary = found or await self._generated(ticket, prompt)
        except RlhfError as error:
            if not costs_one_group(error):
                raise
            self.observer.group_discarded(ticket, error)
            await self.buffer.discard(ticket, type(error).__name__)
            self._outcomes.add(error)
        else:
            if self.trains_on(summary.rewards):
                await self.buffer.finish(ticket, handle, summary)
            else:
                await self.buffer.discard(ticket, NO_SIGNAL)
            self._outcomes.add(None)

    async def _recovered(
        self, ticket: Ticket, prompt: Prompt
    ) -> tuple[Handle, GroupSummary] | None:
        if self.recovery is None:
            return None
        async with self._reads:
            found = await self.on_disk(self.recovery.recover, ticket, prompt)
        if found is None or not self.trainable(ticket, found[1].oldest_version):
            return None  # it is generated again, with the weights of now
        self.observer.group_recovered(ticket)
        return found

    async def _generated(self, ticket: Ticket, prompt: Prompt) -> tuple[Handle, GroupSummary]:
        async def generate() -> Handle:
            with self._generating.call():
                return await self.generation.generate(ticket, prompt, self.sampling)

        async def score(rollouts: Handle) -> tuple[Handle, GroupSummary]:
            with self._being_scored.call():
                return await self.scoring.score(rollouts)

        return await scored(generate, score)

    async def learner_loop(self) -> int:
        """Consumes batches, produces weights and checkpoints; returns the steps done.

        Waits for: `groups_per_step` finished groups. Unblocked by: `rollout_loop`, `stop`, or the
        buffer's stall deadline.
        """
        if self.recovery is not None and self.replayable:
            await self.buffer.forget(await self._unusable(self.recovery))
        for version in range(self.first_step, self.num_steps):
            start = self.clock()
            taken = await self.buffer.take(self.groups_per_step, learner_version=version)
            if not taken:
                return version
            got = self.clock()
            report = await self.learner.train_step(taken)
            trained = self.clock()
            await self.sync.after_step(report.step)
            end = self.clock()
            generation, scoring = self._generating.take(), self._being_scored.take()
            busy = {"scoring": scoring.busy_s, **self.pool_busy()}
            times = StepTimes(
                step_s=end - start,
                learner_wait_s=got - start,
                generation_wait_s=generation.idle_s,
                train_s=trained - got,
                publish_wait_s=end - trained,
                generation_busy_s=generation.busy_s,
                scoring_busy_s=busy.pop("scoring"),
                pool_busy_s=busy,
            )
            self.observer.step(self._with_depth(report), taken, times)
            await self._adapt_depth(report, times)
            if self.recovery is not None:
                numbers = [group.ticket.number for group in taken]
                await self.on_disk(self.recovery.trained, report.step, numbers)
            if self.checkpoints is not None:
                await self.checkpoints.after_step(report.step)
        return self.num_steps

    async def _unusable(self, recovery: RecoveryPort) -> list[int]:
        """Those of `replayable` that the run cannot train again. Waits for: reading them all."""

        async def look(some: Sequence[int]) -> list[int]:
            async with self._reads:
                return await self.on_disk(recovery.unusable, some)

        numbers = self.replayable
        parts = [numbers[at : at + MAX_READS] for at in range(0, len(numbers), MAX_READS)]
        return [number for part in await together(map(look, parts)) for number in part]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What became of each held-out prompt, in their order."""

    answers: Sequence[GroupSummary]
    failures: Sequence[RlhfError]


async def evaluate(
    generation: GenerationPort,
    scoring: ScoringPort,
    prompts: Sequence[Prompt],
    max_tokens: int,
    version: int,
) -> Evaluation:
    """Greedy answers to held-out prompts with the weights that are live, which must be `version`.

    A prompt that nobody could answer or score costs itself only. Raises `WorkerError` when an answer
    came from other weights, and what ends a run (`rlhf_cluster.failures`).
    """
    sampling = Sampling(num_samples=1, temperature=0.0, max_tokens=max_tokens)

    async def one(number: int, prompt: Prompt) -> GroupSummary | RlhfError:
        ticket = Ticket(number=number, version=version, purpose="evaluate")
        try:
            _, summary = await scored(
                lambda: generation.generate(ticket, prompt, sampling), scoring.score
            )
        except RlhfError as error:
            if not costs_one_group(error):
                raise
            return error
        if summary.oldest_version != version:
            raise WorkerError(
                f"evaluation of version {version}: group {summary.group_id} was sampled with "
                f"version {summary.oldest_version}"
            )
        return summary

    found = await together(one(number, prompt) for number, prompt in enumerate(prompts))
    return Evaluation(
        answers=[each for each in found if isinstance(each, GroupSummary)],
        failures=[each for each in found if isinstance(each, RlhfError)],
    )


async def scored(
    generate: Callable[[], Awaitable[Handle]],
    score: Callable[[Handle], Awaitable[tuple[Handle, GroupSummary]]],
) -> tuple[Handle, GroupSummary]:
    """What both give, one after the other; again while the record is lost between them."""
    for _ in range(MAX_LOSSES):
        try:
            return await score(await generate())
        except RecordLost:
            continue
    return await score(await generate())
