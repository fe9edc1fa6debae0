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
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_cluster.errors import RlhfError, ScoringError, WorkerError, first_failure
from rlhf_cluster.ports import (
    BufferPort,
    GenerationPort,
    LearnerPort,
    ScoringPort,
    StepReport,
    Taken,
)
from rlhf_cluster.records import GroupSummary, Prompt, Sampling, Ticket
from rlhf_cluster.weights.sync import WeightSync


class PromptsPort(Protocol):
    def next(self) -> Prompt: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Where one step's wall time went, in seconds."""

    step_s: float
    learner_wait_s: float  # the learner waited for groups
    generation_wait_s: float  # no group was under way: generation waited for a free slot
    train_s: float
    publish_wait_s: float  # the learner waited for the copy of its weights


class ObserverPort(Protocol):
    def step(self, report: StepReport, taken: Sequence[Taken], times: StepTimes) -> None: ...

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None: ...


@dataclass(slots=True, kw_only=True)
class Pipeline:
    """The services of one run and the few numbers that the loops need."""

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
    clock: Callable[[], float] = time.monotonic
    _outcomes: deque[bool] = field(default_factory=lambda: deque(maxlen=100))
    _num_under_way: int = 0
    _idle_since_s: float = 0.0
    _idle_s: float = 0.0

    async def run(self) -> None:
        """Train `num_steps` steps. Version 0 must be live. Raises the first failure of any loop."""
        self._idle_since_s = self.clock()
        try:
            async with asyncio.TaskGroup() as loops:
                watch = loops.create_task(self.sync.run_until_cancelled(check_every_s=0.5))
                rollouts = loops.create_task(self.rollout_loop())
                await self.learner_loop()
                await rollouts
                await self.sync.drain(self.live_timeout_s)
                watch.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures

    async def rollout_loop(self) -> None:
        """Consumes prompts, produces finished groups.

        Waits for: a slot. Unblocked by: `learner_loop` taking groups, a version getting live.
        Ends when the buffer needs no further group.
        """
        async with asyncio.TaskGroup() as groups:
            while (ticket := await self.buffer.admit()) is not None:
                groups.create_task(self.produce(ticket, self.prompts.next()))

    async def produce(self, ticket: Ticket, prompt: Prompt) -> None:
        """One group from ticket to buffer. A failure that outlived its retries is a discard."""
        try:
            with self._under_way():
                rollouts = await self.generation.generate(ticket, prompt, self.sampling)
            handle, summary = await self.scoring.score(rollouts)
        except (WorkerError, ScoringError) as error:
            self.observer.group_discarded(ticket, error)
            await self.buffer.discard(ticket, type(error).__name__)
            self._count_outcome(failed=True, error=error)
        else:
            await self.buffer.finish(ticket, handle, summary)
            self._count_outcome(failed=False)

    async def learner_loop(self) -> None:
        """Consumes batches, produces weights.

        Waits for: `groups_per_step` finished groups. Unblocked by: `rollout_loop`, or the buffer's
        stall deadline.
        """
        for version in range(self.num_steps):
            start = self.clock()
            taken = await self.buffer.take(self.groups_per_step, learner_version=version)
            got = self.clock()
            report = await self.learner.train_step(taken)
            trained = self.clock()
            await self.sync.after_step(report.step)
            end = self.clock()
            times = StepTimes(
                step_s=end - start,
                learner_wait_s=got - start,
                generation_wait_s=self._take_idle_time(),
                train_s=trained - got,
                publish_wait_s=end - trained,
            )
            self.observer.step(report, taken, times)

    @contextmanager
    def _under_way(self) -> Iterator[None]:
        """Counts the groups being generated, and the time when there are none."""
        if self._num_under_way == 0:
            self._idle_s += self.clock() - self._idle_since_s
        self._num_under_way += 1
        try:
            yield
        finally:
            self._num_under_way -= 1
            self._idle_since_s = self.clock()

    def _take_idle_time(self) -> float:
        if self._num_under_way == 0:
            now = self.clock()
            self._idle_s += now - self._idle_since_s
            self._idle_since_s = now
        idle_s, self._idle_s = self._idle_s, 0.0
        return idle_s

    def _count_outcome(self, *, failed: bool, error: RlhfError | None = None) -> None:
        self._outcomes.append(failed)
        rate = sum(self._outcomes) / len(self._outcomes)
        if failed and len(self._outcomes) >= 8 and rate > self.max_error_rate:
            raise type(error or WorkerError())(
                f"{rate:.0%} of the last {len(self._outcomes)} groups failed, over "
                f"scoring.max_error_rate = {self.max_error_rate:g}. The last reason: {error}"
            )


async def evaluate(
    generation: GenerationPort,
    scoring: ScoringPort,
    prompts: Sequence[Prompt],
    max_tokens: int,
    version: int,
) -> list[GroupSummary]:
    """Greedy answers to held-out prompts with the weights that are live, which must be `version`.

    Raises `WorkerError` when an answer came from other weights.
    """
    sampling = Sampling(num_samples=1, temperature=0.0, max_tokens=max_tokens)

    async def one(number: int, prompt: Prompt) -> GroupSummary:
        ticket = Ticket(number=number, version=version, purpose="evaluate")
        group = await generation.generate(ticket, prompt, sampling)
        _, summary = await scoring.score(group)
        if summary.oldest_version != version:
            raise WorkerError(
                f"evaluation of version {version}: group {summary.group_id} was sampled with "
                f"version {summary.oldest_version}"
            )
        return summary

    async with asyncio.TaskGroup() as tasks:
        answers = [tasks.create_task(one(i, prompt)) for i, prompt in enumerate(prompts)]
    return [answer.result() for answer in answers]
