"""The buffer and its gates under any sequence of events: slow and skipped publishes, workers that
die, join and leave, groups that are issued again or go on from their prefix, discards, new depths,
replay, and resumes from a checkpoint's counters. The ledger is kept here and never asks the buffer.
"""

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.replay_pool import ReplayPool
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.config.check_rollouts import largest_look_ahead
from rlhf_cluster.records import BufferState, GroupSummary, Ticket, TrainingGroup
from rlhf_cluster.sections.rl_run import Replay

STEPS = 8
PICK = st.integers(0, 10_000)


@dataclass
class Group:
    """One group being sampled: where, and the oldest version among its tokens so far."""

    ticket: Ticket
    worker: int
    oldest: int


@dataclass(frozen=True)
class Checkpoint:
    state: BufferState
    learner: int
    trained: tuple[int, ...]
    discarded: tuple[int, ...]
    uses: dict[int, list[int]]


class Staleness(RuleBasedStateMachine):
    @initialize(
        max_staleness=st.integers(0, 3),
        depth=st.integers(0, 3),
        groups_per_step=st.integers(1, 4),
        publish_every=st.integers(1, 3),
        look_ahead=st.integers(1, 8),
        in_flight=st.one_of(st.none(), st.integers(1, 6)),
        on_stale=st.sampled_from(["wait", "drop", "reweight"]),
        num_workers=st.integers(1, 3),
        replayed=st.integers(0, 3),
        max_uses=st.integers(2, 3),
        priority=st.sampled_from(["uniform", "reward_spread"]),
    )
    def start(
        self,
        max_staleness,
        depth,
        groups_per_step,
        publish_every,
        look_ahead,
        in_flight,
        on_stale,
        num_workers,
        replayed,
        max_uses,
        priority,
    ):
        self.publish_every = min(publish_every, max_staleness + 1)
        largest = largest_look_ahead(
            max_staleness=max_staleness,
            publish_every=self.publish_every,
            groups_per_step=groups_per_step,
        )
        self.gate = AdmissionGate(
            max_staleness=max_staleness,
            pipeline_depth=depth,
            groups_per_step=groups_per_step,
            num_steps=STEPS,
            max_in_flight_groups=in_flight,
            look_ahead=min(look_ahead, largest),
            on_stale=on_stale,
            stale_limit=max_staleness + 2 if on_stale == "reweight" else None,
        )
        self.replayed, self.replay = replayed, Replay(max_uses=max_uses, priority=priority)
        self.buffer = ExperienceBuffer(self.gate, replay=self.pool())
        self.learner, self.due = 0, 0
        self.oldest: dict[int, int] = {}  # of every group that was finished
        self.uses: dict[int, list[int]] = {}  # the learner's versions that trained a group
        self.running: dict[int, Group] = {}
        self.finished: dict[int, int] = {}  # number -> oldest version
        self.trained: list[int] = []
        self.discarded: list[int] = []
        self.writing: int | None = None  # the version that is being written to the store
        self.target = 0  # the newest version in the store
        self.workers = dict.fromkeys(range(num_workers), 0)
        self.next_worker = num_workers
        self.buffer.set_live_version(0)
        self.checkpoint = self.cut()

    def pool(self) -> ReplayPool | None:
        if not self.replayed:
            return None
        return ReplayPool(self.replay, self.replayed, 3, self.gate.max_staleness)

    def cut(self) -> Checkpoint:
        return Checkpoint(
            self.buffer.state(),
            self.learner,
            tuple(self.trained),
            tuple(self.discarded),
            {number: list(versions) for number, versions in self.uses.items()},
        )

    # -- generation ---------------------------------------------------------------------------

    @rule(pick=PICK)
    def admit(self, pick):
        while (ticket := self.buffer.admit()) is not None:
            self.issue(ticket, pick)

    def issue(self, ticket: Ticket, pick: int) -> None:
        worker = list(self.workers)[pick % len(self.workers)]
        self.running[ticket.number] = Group(ticket, worker, self.workers[worker])

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def finish(self, pick):
        number = list(self.running)[pick % len(self.running)]
        group = self.running.pop(number)
        summary = GroupSummary(
            group_id=group.ticket.group_id,
            oldest_version=group.oldest,
            num_rollouts=1,
            num_tokens=1,
            rewards=(0.0, float(number % 3)),
        )
        self.finished[number] = self.oldest[number] = group.oldest
        finished = TrainingGroup(ticket=group.ticket, handle=number, summary=summary)
        kept = self.buffer.finish(finished)
        too_old = self.learner - group.oldest > self.gate.max_staleness
        assert kept == (not too_old or self.gate.on_stale != "drop")
        self.note_dropped()

    @precondition(lambda self: self.running)
    @rule(pick=PICK)
    def fail(self, pick):
        number = list(self.running)[pick % len(self.running)]
        self.buffer.discard(self.running.pop(number).ticket, "failed")
        self.discarded.append(number)

    @rule(pick=PICK, stays=st.sampled_from(["none", "oldest", "newest"]))
    def everything_is_fast_but_one(self, pick, stays):
        """All that is under way finishes, up to one straggler; then a step."""
        self.admit(pick)
        straggler = {"none": -1, "oldest": 0, "newest": len(self.running) - 1}[stays]
        for place, number in enumerate(list(self.running)):
            if place != straggler:
                self.finish(list(self.running).index(number))
        self.train()

    @rule(pick=PICK, keeps_prefix=st.booleans())
    def worker_dies(self, pick, keeps_prefix):
        """Its groups go elsewhere, from the start or from what they had; a new one pulls."""
        dead = list(self.workers)[pick % len(self.workers)]
        del self.workers[dead]
        self.worker_joins()
        for group in self.running.values():
            if group.worker == dead:
                group.worker = list(self.workers)[pick % len(self.workers)]
                version = self.workers[group.worker]
                group.oldest = min(group.oldest, version) if keeps_prefix else version
        self.tell_live()

    @rule()
    def worker_joins(self):
        self.workers[self.next_worker] = self.target
        self.next_worker += 1

    @precondition(lambda self: len(self.workers) > 1)
    @rule(pick=PICK)
    def worker_leaves(self, pick):
        idle = [w for w in self.workers if all(g.worker != w for g in self.running.values())]
        if idle:
            del self.workers[idle[pick % len(idle)]]
            self.tell_live()

    # -- learning and publishing --------------------------------------------------------------

    @rule()
    def train(self):
        if self.learner == STEPS or not self.buffer.ready(self.gate.groups_per_step):
            return
        candidates = {
            number
            for number, versions in self.uses.items()
            if len(versions) < self.replay.max_uses
            and self.learner - self.oldest[number] <= self.gate.max_staleness
        }
        found = self.buffer.take(self.gate.groups_per_step)
        fresh, again = found[: self.gate.groups_per_step], found[self.gate.groups_per_step :]
        assert len(again) == min(self.replayed, len(candidates))
        assert {taken.ticket.number for taken in again} <= candidates
        for taken in found:
            before = self.uses.setdefault(taken.ticket.number, [])
            assert taken.uses == len(before)
            assert self.learner not in before
            before.append(self.learner)
        for taken in fresh:
            number = taken.handle
            age = self.learner - self.finished.pop(number)
            assert 0 <= age <= self.gate.bound
            self.trained.append(number)
        for number in (*self.running, *self.finished):
            assert sum(taken > number for taken in self.trained) < self.gate.look_ahead
        self.learner += 1
        if self.learner % self.publish_every == 0:
            self.due = self.learner
        self.buffer.set_learner_version(self.learner)
        self.note_dropped()

    @precondition(lambda self: self.writing is None and self.target < self.due)
    @rule()
    def publish_begins(self):
        """The newest weights; those due while the last publish ran are skipped."""
        self.writing = self.learner

    @precondition(lambda self: self.writing is not None)
    @rule()
    def publish_ends(self):
        self.target, self.writing = self.writing, None

    @rule(pick=PICK)
    def worker_pulls(self, pick):
        self.workers[list(self.workers)[pick % len(self.workers)]] = self.target
        self.tell_live()

    def tell_live(self) -> None:
        if min(self.workers.values()) >= self.target:
            self.buffer.set_live_version(self.target)

    @rule(depth=st.integers(0, 3))
    def new_depth(self, depth):
        self.buffer.set_pipeline_depth(depth)

    # -- checkpoints --------------------------------------------------------------------------

    @rule()
    def save(self):
        self.checkpoint = self.cut()

    @rule(pick=PICK, reissue=st.booleans())
    def resume(self, pick, reissue):
        """Everything dies. The learner's weights at the cut are published and pulled first."""
        saved = self.checkpoint
        self.buffer = ExperienceBuffer.resume(self.gate, saved.state, self.pool())
        self.uses = {number: list(versions) for number, versions in saved.uses.items()}
        self.learner = self.target = self.due = saved.learner
        self.trained, self.discarded = list(saved.trained), list(saved.discarded)
        self.workers = dict.fromkeys(self.workers, self.learner)
        self.writing, self.running, self.finished = None, {}, {}
        self.buffer.set_live_version(self.learner)
        for ticket in saved.state.open:
            if reissue:
                self.issue(ticket, pick)
            else:
                self.buffer.discard(ticket, "not issued again")
                self.discarded.append(ticket.number)

    # -- what always holds --------------------------------------------------------------------

    def note_dropped(self) -> None:
        kept = {ticket.number for ticket in self.buffer.state().open}
        for number in [n for n in self.finished if n not in kept]:
            assert self.gate.on_stale == "drop"
            assert self.learner - self.finished.pop(number) > self.gate.max_staleness
            self.discarded.append(number)

    @invariant()
    def every_admitted_group_is_in_one_place(self):
        places = [*self.running, *self.finished, *self.trained, *self.discarded]
        assert sorted(places) == list(range(self.buffer.stats().admitted))
        assert self.buffer.num_in_flight == len(self.running)
        assert sum(self.buffer.stats().discarded.values()) == len(self.discarded)

    @invariant()
    def nothing_under_way_can_get_too_old(self):
        """The proof's own step: kept groups before it, and look_ahead - 1 that overtake it."""
        if self.gate.on_stale == "drop":
            return
        oldest = {n: g.oldest for n, g in self.running.items()} | self.finished
        for number, version in oldest.items():
            before = sum(n < number for n in (*oldest, *self.trained))
            step = (before + self.gate.look_ahead - 1) // self.gate.groups_per_step
            assert step - version <= self.gate.bound

    def teardown(self):
        """From wherever it is, the run comes to its end when everything works again."""
        if not hasattr(self, "buffer"):
            return
        self.buffer.set_pipeline_depth(self.gate.pipeline_depth)
        for _ in range(40 * STEPS):
            if self.learner == STEPS:
                break
            if self.writing is None and self.target < self.due:
                self.publish_begins()
            if self.writing is not None:
                self.publish_ends()
            for worker in range(len(self.workers)):
                self.worker_pulls(worker)
            self.admit(0)
            while self.running:
                self.finish(0)
            self.train()
            self.every_admitted_group_is_in_one_place()
        assert self.learner == STEPS, f"the run stands still: {self.buffer.stats()}"
        assert self.buffer.complete
        assert len(set(self.trained)) == STEPS * self.gate.groups_per_step


TestStaleness = Staleness.TestCase
TestStaleness.settings = settings(max_examples=150, stateful_step_count=60)
