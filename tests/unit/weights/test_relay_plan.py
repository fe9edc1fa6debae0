"""Who fetches what from whom: every node gets everything, and the storage gives it about once."""

import heapq
import math
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_cluster.weights.transports.relay_plan import (
    MAX_STRIKES,
    STRIKE_S,
    Assignment,
    Piece,
    RelayPlan,
)

A, B, C = Piece(1, "a"), Piece(1, "b"), Piece(1, "c")


class Swarm:
    """Nodes that follow the plan, where each fetch takes `storage_s` or `peer_s`. One in `broken` never
    ends a fetch and never serves one; it is known by its lease."""

    def __init__(
        self, nodes: int, pieces: int, broken: frozenset[str] = frozenset(), **rules
    ) -> None:
        self.now, self.parallel = 0.0, rules.pop("parallel", 2)
        self.storage_s, self.peer_s = rules.pop("storage_s", 4.0), rules.pop("peer_s", 1.0)
        self.plan = RelayPlan(clock=lambda: self.now, **{"uploads": 1, **rules})
        self.open = {f"n{i}": [Piece(1, f"f{j}") for j in range(pieces)] for i in range(nodes)}
        self.has: dict[str, set[Piece]] = {node: set() for node in self.open}
        self.broken, self.reads, self.serving = broken, Counter(), Counter()
        self.most_serving: Counter[str | None] = Counter()
        self._under_way: Counter[str] = Counter()
        self._events: list[tuple[float, int, str, Assignment]] = []
        self._waiting: deque[str] = deque()
        self._number = 0

    def run(self) -> float:
        """When the last whole node has everything."""
        for node in list(self.open):
            self._ask(node)
        while self._events or self._waiting:
            if not self._events:  # all that could end has ended: leases do
                self.now += self.plan.lease_s
            else:
                self.now, _, node, found = heapq.heappop(self._events)
                self._ended(node, found)
            for _ in range(len(self._waiting)):
                self._ask(self._waiting.popleft())
        return self.now

    def _ask(self, node: str) -> None:
        while self._under_way[node] < self.parallel and self.open[node]:
            found = self.plan.next(node, self.open[node])
            if found is None:
                if node not in self._waiting:
                    self._waiting.append(node)
                return
            assert found.source != node
            assert found.source is None or found.piece in self.has[found.source], "it has it"
            self.open[node].remove(found.piece)
            self._under_way[node] += 1
            self.reads[found.source is None] += 1
            self.serving[found.source] += 1
            self.most_serving[found.source] = max(
                self.most_serving[found.source], self.serving[found.source]
            )
            if node in self.broken:
                continue
            took = self.storage_s if found.source is None else self.peer_s
            if found.source in self.broken:
                took = self.plan.lease_s
            self._number += 1
            heapq.heappush(self._events, (self.now + took, self._number, node, found))

    def _ended(self, node: str, found: Assignment) -> None:
        self._under_way[node] -= 1
        self.serving[found.source] -= 1
        if found.source in self.broken:
            self.open[node].append(found.piece)
            self.plan.failed(node, found.piece, found.source)
        else:
            self.has[node].add(found.piece)
            self.plan.done(node, found.piece, f"address of {node}")
        if node not in self._waiting:
            self._waiting.append(node)

    @property
    def complete(self) -> bool:
        everything = {Piece(1, f.name) for has in self.has.values() for f in has}
        return all(self.has[n] == everything for n in self.has if n not in self.broken)


@pytest.mark.parametrize("nodes", [1, 2, 16, 64])
def test_the_storage_gives_each_file_once_and_all_are_done_soon_after(nodes: int) -> None:
    """64 nodes take at most half as long again as the storage takes for one, not 64 times as long,
    although a node takes a file from another one no faster than the storage gives them out."""
    swarm = Swarm(nodes, 32, streams=4)
    took = swarm.run()
    assert swarm.complete
    assert swarm.reads[True] == 32
    assert swarm.most_serving[None] <= 4
    assert max((n for s, n in swarm.most_serving.items() if s), default=0) <= 1
    storage_s = 32 / min(4, swarm.parallel * nodes) * swarm.storage_s
    assert took <= 1.5 * storage_s + 2 * math.log2(nodes) * swarm.peer_s


@given(
    nodes=st.integers(1, 12),
    pieces=st.integers(1, 12),
    streams=st.integers(1, 4),
    uploads=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_every_node_gets_everything_although_some_hang(
    nodes, pieces, streams, uploads, seed
) -> None:
    rng = random.Random(seed)
    broken = frozenset(f"n{i}" for i in range(1, nodes) if rng.random() < 0.3)
    swarm = Swarm(nodes, pieces, broken, streams=streams, uploads=uploads, lease_s=10.0)
    swarm.run()
    assert swarm.complete


def test_a_node_that_hangs_holds_its_source_for_a_lease_and_no_longer() -> None:
    now = [0.0]
    plan = RelayPlan(streams=1, uploads=1, lease_s=10.0, clock=lambda: now[0])
    assert plan.next("hangs", [A]) == Assignment(piece=A, source=None)
    assert plan.next("n1", [A, B]) is None, "the only stream is taken"
    now[0] = 9.9
    assert plan.next("n1", [A, B]) is None
    now[0] = 10.0
    found = plan.next("n1", [A, B])
    assert found is not None
    assert found.source is None


def test_a_node_that_serves_nothing_usable_is_left_alone_after_its_strikes() -> None:
    plan = RelayPlan(streams=1, uploads=1)
    for piece in (A, B):
        plan.done("bad", piece, "address")
    for number, piece in enumerate([A, B][:MAX_STRIKES]):
        found = plan.next(f"n{number}", [piece])
        assert found is not None
        assert found.source == "bad"
        plan.failed(f"n{number}", piece, found.source)
    plan.done("bad", A, "address")
    found = plan.next("n9", [A])
    assert found is not None
    assert found.source is None, "it is believed no more"


def test_a_source_that_is_busy_serves_the_next_one_when_it_is_done() -> None:
    plan = RelayPlan(streams=1, uploads=1)
    plan.done("n0", A, "address of n0")
    assert plan.next("n1", [A]) == Assignment(piece=A, source="n0", address="address of n0")
    assert plan.next("n2", [A]) is None
    plan.done("n1", A, "address of n1")
    assert {plan.next(n, [A]).source for n in ("n2", "n3")} == {"n0", "n1"}  # type: ignore[union-attr]


def test_a_failed_read_of_the_storage_gives_its_stream_back() -> None:
    plan = RelayPlan(streams=1, uploads=1)
    plan.next("n0", [A])
    plan.failed("n0", A, None)
    assert plan.next("n1", [A]) == Assignment(piece=A, source=None)


def test_what_a_node_removed_is_asked_for_elsewhere_and_old_versions_are_forgotten() -> None:
    plan = RelayPlan(streams=1, uploads=1)
    old, new = Piece(1, "a"), Piece(2, "a")
    for node in ("n0", "n1"):
        plan.done(node, old, "address")
    plan.done("n0", new, "address")
    plan.keeps("n0", [2])
    assert plan.next("n2", [old]) == Assignment(piece=old, source=None), "n1's is forgotten too"
    assert plan.next("n2", [new]).source == "n0"  # type: ignore[union-attr]


def test_a_learner_that_goes_back_publishes_other_files_under_the_old_names() -> None:
    plan = RelayPlan(streams=1, uploads=1)
    plan.done("n0", A, "address")
    plan.begin_anew()
    assert plan.next("n1", [A]) == Assignment(piece=A, source=None)


@pytest.mark.parametrize("slow_s", [1.0, 1000.0])
def test_a_report_about_the_files_of_a_learner_that_died_is_ignored(slow_s: float) -> None:
    """Also where the lease had ended before the learner did, as it does when the storage is slow."""
    now = [0.0]
    plan = RelayPlan(streams=2, uploads=1, clock=lambda: now[0])
    plan.lends("learner", [(B, "address")])
    plan.next("late", [A])
    plan.next("late", [B])
    now[0] += slow_s
    plan.next("other", [C])
    plan.begin_anew()
    plan.lends("learner", [(B, "address")])
    plan.done("late", A, "the file before")
    plan.failed("late", B, "learner")
    assert plan.next("n1", [A]) == Assignment(piece=A, source=None)
    assert plan.next("n1", [B]) == Assignment(piece=B, source="learner", address="address")
    plan.done("n1", A, "address of n1")
    assert plan.next("late", [A]) == Assignment(piece=A, source="n1", address="address of n1")
    plan.done("late", A, "address of late")
    assert plan.next("n2", [A]) is not None, "what it fetched since is believed"


def test_a_plan_forgets_which_fetches_of_old_versions_were_never_reported() -> None:
    plan = RelayPlan(streams=9, uploads=1)
    for number in range(9):
        plan.next("dies", [Piece(number, "a")])
        if number == 5:
            plan.begin_anew()
    plan.keeps("n0", [9])
    assert not plan._unreported
    assert not plan._outdated


class Told:
    """A plan in which nodes "good" and "other" have all pieces, and serve one reader at a time."""

    def __init__(self) -> None:
        self.now = 0.0
        self.plan = RelayPlan(streams=9, uploads=1, clock=lambda: self.now)
        for node in ("good", "other"):
            self.done(node)

    def done(self, node: str) -> None:
        for piece in (A, B, C):
            self.plan.done(node, piece, f"address of {node}")

    def sources(self, reader: str) -> set[str | None]:
        """Where `reader` is sent for two pieces at once; then both turns end."""
        found = {self.plan.next(reader, [piece]) for piece in (B, C)}
        for piece in (B, C):
            self.plan.failed(reader, piece, None)
        return {assignment.source for assignment in found if assignment is not None}


def test_n03_one_reader_ends_no_source_and_is_not_sent_back_there() -> None:
    told = Told()
    for _ in range(2 * MAX_STRIKES):
        told.plan.failed("slow", A, "good")
    assert told.sources("slow") == {"other"}
    assert told.sources("another") == {"good", "other"}
    told.plan.failed("slow", A, "other")
    assert told.sources("slow") == {None}, "nobody is left for it but the storage"


def test_n03_strikes_are_forgiven() -> None:
    told = Told()
    for number in range(MAX_STRIKES):
        told.plan.failed(f"n{number}", A, "good")
    told.now = STRIKE_S - 1.0
    told.done("good")
    assert told.sources("n9") == {"other"}
    told.now = STRIKE_S
    told.done("good")
    assert told.sources("n9") == {"good", "other"}
    assert told.sources("n0") == {"good", "other"}


def test_n03_strikes_that_lie_far_apart_do_not_add_up() -> None:
    told = Told()
    for number in range(3 * MAX_STRIKES):
        told.now = number * STRIKE_S
        told.plan.failed(f"n{number}", A, "good")
        assert "good" in told.sources("n99")


def test_n03_who_asks_for_a_piece_has_lost_it_and_is_not_sent_to_itself() -> None:
    told = Told()
    assert told.sources("good") == {"other"}
    told.plan.keeps("other", [])
    assert told.sources("good") == {None}


def test_who_asks_again_after_an_answer_that_was_lost_holds_one_turn_and_not_two():
    plan = RelayPlan(streams=1, uploads=1, clock=lambda: 0.0)
    assert plan.next("n0", [A]) == Assignment(piece=A, source=None)
    plan.lends("learner", [(A, "address")])  # the answer before came too late for n0
    from_learner = Assignment(piece=A, source="learner", address="address")
    assert plan.next("n0", [A]) == from_learner
    assert plan.next("n1", [B]) == Assignment(piece=B, source=None), "the storage is free again"
    plan.done("n0", A, "n0's")
    assert plan.next("n1", [A]) == from_learner, "so is the learner"


def test_a_node_that_asks_for_hundreds_of_files_is_answered_by_looking_at_few():
    """A version of 512 files and a thousand nodes: who has to wait costs the plan nearly nothing."""
    looked: list[Piece] = []

    class Counted(RelayPlan):
        def _num_holders(self, piece: Piece) -> int:
            looked.append(piece)
            return super()._num_holders(piece)

    plan = Counted(streams=8, uploads=4, clock=lambda: 0.0)
    pieces = [Piece(1, f"rank-{i}") for i in range(512)]
    plan.lends("learner", [(piece, "address") for piece in pieces])
    for number in range(4):
        assert plan.next(f"n{number}", pieces) is not None
    looked.clear()
    for number in range(4, 1000):
        assert plan.next(f"n{number}", pieces) is None
    assert looked == []
