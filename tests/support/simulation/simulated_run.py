"""One run of the real buffer and gates in simulated time: workers, learner, publishes (simpy).

The simulation keeps a ledger of its own: which version sampled a group, and at which version the
group was trained. It does not ask the buffer, so it finds what the buffer's checks would miss, and
it can break the rules on purpose (`order`, `live_at`) to show what they are for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from typing import Any, Literal

import simpy

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.records import GroupSummary, Ticket, TrainingGroup

Draw = Callable[[random.Random], float]


def long_tailed(rng: random.Random) -> float:
    """Log-normal, mean 3.1, with one in a hundred over 33."""
    return rng.lognormvariate(0.0, 1.5)


@dataclass(frozen=True)
class Trained:
    number: int
    duration: float
    staleness: int


@dataclass
class SimulatedRun:
    """`order`: how the learner takes groups. "buffer" is the system's own; "completion" takes what
    finishes first; "sliding" takes what is finished among the first `window` that are left;
    "window" is the system's window of `window` groups, with or without its price at admission.

    A group's duration follows from `seed` and its number, so that runs with other rules compare.
    `live_at`: "pulled" is the system's own; "published" reports a version before workers have it.
    """

    gate: AdmissionGate
    seed: int
    duration: Draw = long_tailed
    train: Draw = random.Random.random
    publish: Draw = lambda rng: 2 * rng.random()
    pull: Draw = random.Random.random
    publish_every: int = 1
    num_workers: int = 2
    discard_rate: float = 0.0
    order: Literal["buffer", "completion", "sliding", "window"] = "buffer"
    window: int = 1
    live_at: Literal["pulled", "published"] = "pulled"
    generated: dict[int, float] = field(default_factory=dict)
    trained: list[Trained] = field(default_factory=list)
    learner: int = 0

    def __post_init__(self) -> None:
        self.rng, self.env = random.Random(self.seed), simpy.Environment()
        self.buffer = ExperienceBuffer(self.gate)
        self.workers = [0] * self.num_workers
        self.sampled_with: dict[int, int] = {}
        self.left: list[int] = []  # admitted, not taken, not discarded
        self.done: list[int] = []  # finished and not taken, in the order of completion
        self._changed = self.env.event()
        self._due, self._publishing = 0, False

    @property
    def ages(self) -> list[int]:
        return [group.staleness for group in self.trained]

    def run(self) -> SimulatedRun:
        self.buffer.set_live_version(0)
        self._admit()
        self.env.process(self._learn())
        self.env.run()
        assert self.learner == self.gate.num_steps, f"the run stands still: {self.buffer.stats()}"
        return self

    def _admit(self) -> None:
        while (ticket := self.buffer.admit()) is not None:
            self.left.append(ticket.number)
            self.env.process(self._group(ticket))

    def _notify(self) -> None:
        self._admit()
        self._changed.succeed()
        self._changed = self.env.event()

    def _group(self, ticket: Ticket) -> Generator[simpy.Event, Any, None]:
        version = self.rng.choice(self.workers)
        duration = self.duration(random.Random(self.seed * 1_000_003 + ticket.number))
        self.generated[ticket.number] = duration
        yield self.env.timeout(duration)
        if self.rng.random() < self.discard_rate:
            self.left.remove(ticket.number)
            self.buffer.discard(ticket, "simulated")
        else:
            self.sampled_with[ticket.number] = version
            summary = self._summary(ticket, version)
            if self.buffer.finish(TrainingGroup(ticket=ticket, handle=None, summary=summary)):
                self.done.append(ticket.number)
            self._forget_dropped()
        self._notify()

    def _summary(self, ticket: Ticket, version: int) -> GroupSummary:
        if self.live_at == "published":  # the fault is in the report, not in the buffer
            version = max(version, ticket.version)
        return GroupSummary(
            group_id=ticket.group_id,
            oldest_version=version,
            num_rollouts=1,
            num_tokens=1,
            rewards=(0.0,),
        )

    def _learn(self) -> Generator[simpy.Event, Any, None]:
        while self.learner < self.gate.num_steps:
            while (numbers := self._take()) is None:
                yield self._changed
            for number in numbers:
                age = self.learner - self.sampled_with[number]
                self.trained.append(Trained(number, self.generated[number], age))
            self._notify()
            yield self.env.timeout(self.train(self.rng))
            self.learner += 1
            self.buffer.set_learner_version(self.learner)
            self._forget_dropped()
            if self.learner % self.publish_every == 0:
                self._due = self.learner
                if not self._publishing:
                    self.env.process(self._publish())
            self._notify()

    def _publish(self) -> Generator[simpy.Event, Any, None]:
        """As `weights.sync`: one at a time, and the newest due version follows."""
        self._publishing = True
        version = -1
        while version < self._due:
            version = self.learner
            yield self.env.timeout(self.publish(self.rng))
            if self.live_at == "published":
                self.buffer.set_live_version(version)
                self._notify()
            for worker in range(self.num_workers):
                yield self.env.timeout(self.pull(self.rng))
                self.workers[worker] = version
            if self.live_at == "pulled":
                self.buffer.set_live_version(version)
                self._notify()
        self._publishing = False

    def _take(self) -> list[int] | None:
        num_groups = self.gate.groups_per_step
        if self.order == "buffer":
            if not self.buffer.ready(num_groups):
                return None
            numbers = [taken.ticket.number for taken in self.buffer.take(num_groups)]
        else:
            numbers = self._pick(num_groups)
            if len(numbers) < num_groups:
                return None
        for number in numbers:
            self.left.remove(number)
            self.done.remove(number)
        return numbers

    def _pick(self, num_groups: int) -> list[int]:
        if self.order == "completion":
            return self.done[:num_groups]
        left, picked = list(self.left), []
        while len(picked) < num_groups:
            window = left[: self.window]
            if self.order == "window":
                window = [n for n in window if n < left[0] + self.window]
            ready = [n for n in window if n in self.done]
            if not ready:
                break
            picked.append(ready[0])
            left.remove(ready[0])
        return picked

    def _forget_dropped(self) -> None:
        """Groups that the buffer discarded for their age."""
        if self.gate.on_stale == "drop":
            kept = {entry.number for entry in self.buffer.state().open}
            self.left = [n for n in self.left if n in kept]
            self.done = [n for n in self.done if n in kept]
