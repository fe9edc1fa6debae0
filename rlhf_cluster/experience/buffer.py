"""The experience buffer as a state machine: no clock, no waiting, no transport.

A group's life: admit -> finish -> take, or admit -> discard. Promises:
- every admitted ticket ends exactly once: taken, or discarded with a reason that is counted;
- `take` hands out whole groups in admission order and nothing before its turn;
- a group over the staleness bound raises `StalenessError` when taken;
- versions never go back.

`Handle`s are kept as they are; the buffer never looks inside.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass, field

from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.experience.staleness import AdmissionGate, check_staleness
from rlhf_cluster.ports import Handle, Taken
from rlhf_cluster.records import GroupSummary, Ticket


@dataclass(frozen=True, slots=True, kw_only=True)
class BufferStats:
    """Counters since the start, and what stands in the buffer now."""

    admitted: int
    finished: int
    taken: int
    discarded: dict[str, int]
    in_flight: tuple[str, ...]  # ids of groups admitted and not yet finished, oldest first
    ready: int  # finished and not yet taken
    learner_version: int
    live_version: int

    @property
    def num_discarded(self) -> int:
        return sum(self.discarded.values())


@dataclass(slots=True)
class ExperienceBuffer:
    """`live_version` is -1 until the first version is live; nothing is admitted before that."""

    gate: AdmissionGate
    learner_version: int = 0
    live_version: int = -1
    _waiting: OrderedDict[int, Taken | Ticket] = field(default_factory=OrderedDict)
    _admitted: int = 0
    _finished: int = 0
    _taken: int = 0
    _discarded: Counter[str] = field(default_factory=Counter)

    @property
    def num_in_flight(self) -> int:
        return self._admitted - self._finished - self._discarded.total()

    @property
    def num_kept(self) -> int:
        return self._admitted - self._discarded.total()

    @property
    def complete(self) -> bool:
        """All groups of the run have been finished, so none will ever be admitted again."""
        return self._finished >= self.gate.total_groups

    def admit(self) -> Ticket | None:
        """A ticket, or None while there is no free slot."""
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
        return ticket

    def finish(self, ticket: Ticket, handle: Handle, summary: GroupSummary) -> None:
        self._open(ticket, "finish")
        if summary.oldest_version < ticket.version:
            raise StalenessError(
                f"group {ticket.group_id} was admitted at version {ticket.version} and holds "
                f"tokens of version {summary.oldest_version}: a worker sampled with weights older "
                "than those reported live"
            )
        self._waiting[ticket.number] = Taken(ticket=ticket, handle=handle, summary=summary)
        self._finished += 1

    def discard(self, ticket: Ticket, reason: str) -> None:
        self._open(ticket, "discard")
        del self._waiting[ticket.number]
        self._discarded[reason] += 1

    def ready(self, num_groups: int) -> bool:
        """Whether the oldest `num_groups` groups are all finished."""
        heads = [entry for _, entry in zip(range(num_groups), self._waiting.values(), strict=False)]
        return len(heads) == num_groups and all(isinstance(head, Taken) for head in heads)

    def saw_learner(self, version: int) -> None:
        """The learner has done `version` optimizer steps."""
        self.learner_version = self._advance("learner", self.learner_version, version)

    def version_live(self, version: int) -> None:
        """Every worker samples with `version` or later, so the learner has done that many steps."""
        self.live_version = self._advance("live", self.live_version, version)
        self.learner_version = max(self.learner_version, version)

    def take(self, num_groups: int) -> list[Taken]:
        """The oldest `num_groups` groups; call only when `ready`. Raises `StalenessError`."""
        if not self.ready(num_groups):
            raise RecordError(
                f"take({num_groups}) with {len(self._waiting)} groups waiting, the oldest not all "
                "finished; ask ready() first"
            )
        groups = []
        for number in list(self._waiting)[:num_groups]:
            entry = self._waiting[number]
            assert isinstance(entry, Taken)
            check_staleness(
                group_id=entry.ticket.group_id,
                oldest_version=entry.summary.oldest_version,
                learner_version=self.learner_version,
                max_staleness=self.gate.max_staleness,
            )
            groups.append(entry)
        for group in groups:
            del self._waiting[group.ticket.number]
        self._taken += num_groups
        return groups

    def stats(self) -> BufferStats:
        open_tickets = [entry for entry in self._waiting.values() if isinstance(entry, Ticket)]
        return BufferStats(
            admitted=self._admitted,
            finished=self._finished,
            taken=self._taken,
            discarded=dict(self._discarded),
            in_flight=tuple(ticket.group_id for ticket in open_tickets),
            ready=len(self._waiting) - len(open_tickets),
            learner_version=self.learner_version,
            live_version=self.live_version,
        )

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
    """The counters under their names in the table of metrics."""
    values = {
        "buffer/admitted_total": float(stats.admitted),
        "buffer/finished_total": float(stats.finished),
        "buffer/taken_total": float(stats.taken),
        "buffer/in_flight": float(len(stats.in_flight)),
        "buffer/ready": float(stats.ready),
    }
    discarded = {f"buffer/discarded_total/{k}": float(v) for k, v in stats.discarded.items()}
    return values | discarded
