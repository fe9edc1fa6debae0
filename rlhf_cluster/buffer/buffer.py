"""The experience buffer as a state machine: no clock, no waiting, no transport.

The life of a group is admit -> finish -> take, or a discard before it is taken. With a `replay` it may
be returned for training again after that.

Promises:
- every admitted ticket ends exactly once: taken, or discarded with a reason that is counted;
- `take` returns complete groups, the oldest finished first, within the look-ahead window that starts
  at the oldest group (see `staleness`), and none before its turn. Replayed groups follow; no counter of
  admitted or taken groups includes them;
- a group that exceeds `gate.bound` is never returned. With on_stale = "drop" one that exceeds
  `max_staleness` is discarded with the reason "stale" as soon as it is known; otherwise `take` raises
  `StalenessError`;
- versions never decrease.

`Handle`s are kept as they are; the buffer never looks inside.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from rlhf_cluster.buffer.replay_pool import ReplayPool
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.records import BufferState, Ticket, TrainingGroup

STALE = "stale"
"""Discard reason of a group that is too old."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStats:
    """Counters since the start, and the present content of the buffer."""

    admitted: int
    finished: int
    taken: int
    reweighted: int  # taken beyond max_staleness, with on_stale = "reweight"
    discarded: dict[str, int]
    in_flight: tuple[str, ...]  # ids of groups admitted and not yet finished, oldest first
    ready: int  # finished and not yet taken
    learner_version: int
    live_version: int
    replayed: int | None = None  # groups returned again; None without a replay
    replayable: int = 0  # groups that may be replayed at the present version
    oldest_age_s: float = 0.0  # since the admission of the oldest group that is not taken

    @property
    def num_discarded(self) -> int:
        return sum(self.discarded.values())


def trim_to_bound(state: BufferState, gate: AdmissionGate) -> BufferState:
    """Return `state` without the tickets that would be trained beyond the bound of `gate`.

    The bound may be smaller, or the window larger, than when the tickets were admitted. The newest
    tickets are discarded as stale if they would exceed the bound even with groups generated at once.
    Others are admitted in their place.
    """
    last = state.learner_version + gate.bound
    kept = tuple(
        ticket
        for place, ticket in enumerate(state.open)
        if gate.latest_step(state.learner_version, place) <= last
    )
    over = len(state.open) - len(kept)
    if not over:
        return state
    discarded = {**state.discarded, STALE: state.discarded.get(STALE, 0) + over}
    return replace(state, open=kept, discarded=discarded)


@dataclass(slots=True)
class ExperienceBuffer:
    """Buffer of one run. `live_version` is -1 until the first version is live.

    Nothing is admitted before that.
    """

    gate: AdmissionGate
    learner_version: int = 0
    live_version: int = -1
    replay: ReplayPool | None = None  # None: a group is returned once
    _waiting: OrderedDict[int, TrainingGroup | Ticket] = field(default_factory=OrderedDict)
    _num_in_flight: int = 0
    _admitted: int = 0
    _finished: int = 0
    _taken: int = 0
    _reweighted: int = 0
    _discarded: Counter[str] = field(default_factory=Counter)

    @classmethod
    def resume(
        cls, gate: AdmissionGate, state: BufferState, replay: ReplayPool | None = None
    ) -> ExperienceBuffer:
        """Return the buffer of a run that resumes from `state`.

        Open tickets are in flight again: the caller finishes each once more, or discards it. They
        keep their numbers and versions, so the bound holds for them as for any other. `replay` is
        empty, and gets the state of the checkpoint's.

        Raises `StalenessError` when counters and version do not belong together: a counter that
        started from zero would admit a whole run's worth of groups at once.
        """
        groups = state.learner_version * gate.groups_per_step
        kept = state.admitted - sum(state.discarded.values())
        if state.taken != groups or kept != state.taken + len(state.open):
            raise StalenessError(
                f"resume at learner version {state.learner_version} with {state.taken} groups "
                f"taken, {len(state.open)} open and {kept} admitted and not discarded; "
                f"{state.learner_version} steps of {gate.groups_per_step} groups have taken "
                f"{groups}, and taken + open must be those kept. Counters, groups_per_step and "
                "learner must come from the same checkpoint"
            )
        if replay is not None:
            replay.load_state(state.used, state.replayed)
        return cls(
            gate,
            learner_version=state.learner_version,
            replay=replay,
            _waiting=OrderedDict((ticket.number, ticket) for ticket in state.open),
            _num_in_flight=len(state.open),
            _admitted=state.admitted,
            _finished=state.finished,
            _taken=state.taken,
            _reweighted=state.reweighted,
            _discarded=Counter(state.discarded),
        )

    def state(self) -> BufferState:
        """Return the state for `resume`. Call between two steps."""
        tickets = [e if isinstance(e, Ticket) else e.ticket for e in self._waiting.values()]
        return BufferState(
            learner_version=self.learner_version,
            admitted=self._admitted,
            # The ready ones are open again after a resume, and are finished a second time.
            finished=self._finished - self.num_ready,
            taken=self._taken,
            reweighted=self._reweighted,
            discarded=dict(self._discarded),
            open=tuple(tickets),
            replayed=0 if self.replay is None else self.replay.replayed,
            used=() if self.replay is None else self.replay.state(self.learner_version),
        )

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    @property
    def num_ready(self) -> int:
        return len(self._waiting) - self._num_in_flight

    @property
    def oldest(self) -> int | None:
        """The number of the oldest group that is not taken."""
        return next(iter(self._waiting), None)

    @property
    def num_kept(self) -> int:
        return self._admitted - self._discarded.total()

    @property
    def complete(self) -> bool:
        """Whether all groups of the run have been taken, so that none will be admitted again."""
        return self._taken >= self.gate.total_groups

    def admit(self) -> Ticket | None:
        """Return a ticket, or None while there is no free slot."""
        if self.live_version < 0:
            return None
        capacity = self.gate.capacity(
            learner_version=self.learner_version,
            live_version=self.live_version,
            num_kept=self.num_kept,
            num_in_flight=self.num_in_flight,
        )
        if capacity <= 0:
            return None
        ticket = Ticket(number=self._admitted, version=self.live_version)
        self._waiting[ticket.number] = ticket
        self._admitted += 1
        self._num_in_flight += 1
        return ticket

    def finish(self, group: TrainingGroup) -> bool:
        """Store the finished group, and return whether it was kept.

        With on_stale = "drop" one that is too old is discarded.
        """
        ticket, summary = group.ticket, group.summary
        self._open(ticket, "finish")
        if summary.oldest_version < ticket.version:
            raise StalenessError(
                f"group {ticket.group_id} was admitted at version {ticket.version} and holds "
                f"tokens of version {summary.oldest_version}: a worker sampled with weights older "
                "than those reported live"
            )
        self._waiting[ticket.number] = group
        self._finished += 1
        self._num_in_flight -= 1
        self._drop_stale([ticket.number])
        return ticket.number in self._waiting

    def discard(self, ticket: Ticket, reason: str) -> None:
        self._open(ticket, "discard")
        del self._waiting[ticket.number]
        self._num_in_flight -= 1
        self._discarded[reason] += 1

    def ready(self, num_groups: int) -> bool:
        """Whether `num_groups` groups can be taken."""
        if self.num_ready < num_groups:
            return False
        return len(self._next(num_groups)) == num_groups

    def set_learner_version(self, version: int) -> None:
        """Record that the learner has done `version` steps."""
        self.learner_version = self._advance("learner", self.learner_version, version)
        self._drop_stale()

    def set_live_version(self, version: int) -> None:
        """Record that every worker samples with `version` or later.

        The learner has therefore done that many steps.
        """
        self.live_version = self._advance("live", self.live_version, version)
        self.set_learner_version(max(self.learner_version, version))

    def set_pipeline_depth(self, depth: int) -> None:
        """Change the pacing of admission. The bound does not depend on it."""
        self.gate = replace(self.gate, pipeline_depth=depth)

    def take(self, num_groups: int) -> list[TrainingGroup]:
        """Return the next `num_groups` groups and those that are replayed. Call only when `ready`.

        Raises `StalenessError`.
        """
        groups = self._next(num_groups)
        if len(groups) < num_groups:
            raise RecordError(
                f"take({num_groups}) with {len(self._waiting)} groups waiting, of which "
                f"{len(groups)} can be taken; ask ready() first"
            )
        again = [] if self.replay is None else self.replay.take(self.learner_version)
        # All are checked before any is taken: an error leaves the waiting groups as they were.
        for group in (*groups, *again):
            self.gate.check(
                group_id=group.ticket.group_id,
                oldest_version=group.summary.oldest_version,
                learner_version=self.learner_version,
            )
        for group in groups:
            del self._waiting[group.ticket.number]
            self._reweighted += self._is_stale(group)
        self._taken += num_groups
        if self.replay is not None:
            self.replay.record_trained(groups, self.learner_version)
        return [*groups, *again]

    def exclude_from_replay(self, numbers: Iterable[int]) -> None:
        """Exclude these groups, which were taken before, from replay."""
        if self.replay is not None:
            self.replay.exclude(numbers)

    def stats(self) -> BufferStats:
        open_tickets = [entry for entry in self._waiting.values() if isinstance(entry, Ticket)]
        return BufferStats(
            admitted=self._admitted,
            finished=self._finished,
            taken=self._taken,
            reweighted=self._reweighted,
            discarded=dict(self._discarded),
            in_flight=tuple(ticket.group_id for ticket in open_tickets),
            ready=self.num_ready,
            learner_version=self.learner_version,
            live_version=self.live_version,
            replayed=None if self.replay is None else self.replay.replayed,
            replayable=0
            if self.replay is None
            else len(self.replay.candidates(self.learner_version)),
        )

    def _next(self, num_groups: int) -> list[TrainingGroup]:
        """Return up to `num_groups` finished groups in the window, the oldest first.

        The window starts at the oldest group that is not taken. The groups picked here are treated as
        taken, so it starts at the first one that is not finished.
        """
        found: list[TrainingGroup] = []
        head: int | None = None
        for number, entry in self._waiting.items():
            if len(found) == num_groups:
                break
            if head is not None and number >= head + self.gate.look_ahead:
                break
            if isinstance(entry, TrainingGroup):
                found.append(entry)
            elif head is None:
                head = number
        return found

    def _drop_stale(self, among: Iterable[int] | None = None) -> None:
        """Discard finished groups older than `max_staleness`, if on_stale is "drop".

        `among` holds the ticket numbers to check; None checks every group.
        """
        if self.gate.on_stale != "drop":
            return
        waiting = self._waiting
        entries = waiting.values() if among is None else [waiting[number] for number in among]
        ready = [entry for entry in entries if isinstance(entry, TrainingGroup)]
        for group in filter(self._is_stale, ready):
            del self._waiting[group.ticket.number]
            self._discarded[STALE] += 1

    def _is_stale(self, group: TrainingGroup) -> bool:
        return self.gate.is_stale(group.summary.oldest_version, self.learner_version)

    def _open(self, ticket: Ticket, action: str) -> None:
        if not isinstance(self._waiting.get(ticket.number), Ticket):
            raise RecordError(
                f"{action} of group {ticket.group_id}, which is not in flight: never admitted, or "
                "already finished, taken or discarded. A group ends exactly once"
            )

    @staticmethod
    def _advance(whose: str, current: int, version: int) -> int:
        if version < current:
            raise StalenessError(
                f"the {whose} version would go back from {current} to {version}; versions only rise"
            )
        return version


def buffer_metrics(stats: BufferStats) -> dict[str, float]:
    """Return the counters under their names in the table of metrics."""
    values = {
        "buffer/admitted_total": float(stats.admitted),
        "buffer/finished_total": float(stats.finished),
        "buffer/taken_total": float(stats.taken),
        "buffer/reweighted_total": float(stats.reweighted),
        "buffer/in_flight": float(len(stats.in_flight)),
        "buffer/ready": float(stats.ready),
        "buffer/oldest_age_s": stats.oldest_age_s,
    }
    if stats.replayed is not None:
        values["buffer/replayed_total"] = float(stats.replayed)
        values["buffer/replayable"] = float(stats.replayable)
    discarded = {f"buffer/discarded_total/{k}": float(v) for k, v in stats.discarded.items()}
    return values | discarded
