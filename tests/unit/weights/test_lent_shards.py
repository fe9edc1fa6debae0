"""Shards that learner ranks lend to the relay: the first nodes take them from memory, whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.waiting import reply_deadline
from rlhf_cluster.weights import store
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.transports.lent_shards import WITHDRAW_SHARE, ShardLender
from rlhf_cluster.weights.transports.mirror_carrier import ThreadCarrier
from rlhf_cluster.weights.transports.mirror_folder import NodeCopies
from rlhf_cluster.weights.transports.node_mirror import Mirror
from rlhf_cluster.weights.transports.rank_memory import Served, ShardServer
from rlhf_cluster.weights.transports.relay_plan import Assignment, Piece, RelayPlan
from rlhf_cluster.weights.transports.shared_files import MANIFEST_NAME, FileSink, version_dir
from rlhf_cluster.weights.transports.transport import Deadline, ShardImage
from tests.support.builders.small_weights import assert_same, small_model, split_evenly

RANKS = 2


def soon() -> Deadline:
    return Deadline("lending", 60.0)


class Planner:
    """The plan in this process; it counts where files came from, and can be out of reach."""

    def __init__(self) -> None:
        self.plan = RelayPlan(streams=2, uploads=2)
        self.sources: list[str | None] = []
        self.gone = False

    def exchange(
        self, node: str, wanted: Sequence[Piece], done: Sequence[Any], failed: Sequence[Any]
    ) -> Assignment | None:
        for piece, address in done:
            self.plan.done(node, piece, address)
        for piece, source in failed:
            self.plan.failed(node, piece, source)
        found = self.plan.next(node, wanted) if wanted else None
        if found is not None:
            self.sources.append(found.source)
        return found

    def keeps(self, node: str, versions: Sequence[int]) -> None:
        self.plan.keeps(node, versions)

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]], timeout_s: float) -> None:
        if self.gone:
            raise WeightError("the planner cannot be reached")
        self.plan.lends(node, pieces)


class Learner:
    """Ranks that write to a store and lend what they write."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.root, self.planner, self.told = root, Planner(), list[str]()
        self.servers = [
            ShardServer(f"learner-{rank}", "127.0.0.1", 30.0, self.told.append)
            for rank in range(RANKS)
        ]
        self.lenders = [
            ShardLender(f"learner-{r}", self.planner, server, told=self.told.append, **options)
            for r, server in enumerate(self.servers)
        ]

    def publish(self, version: int, seed: int) -> WeightVersion:
        reports = []
        for rank, parts in enumerate(split_evenly(small_model(seed=seed), RANKS)):
            self.lenders[rank].withdraw(soon())
            sinks = [FileSink(self.root), self.lenders[rank].sink(soon())]
            reports.append(send_shard(sinks, version, rank, parts))
        found = store.commit(self.root, version, reports, 10)
        manifest = (version_dir(self.root, version) / MANIFEST_NAME).read_bytes()
        image = ShardImage(chunks=(memoryview(manifest),))
        self.lenders[0].lend(version, MANIFEST_NAME, image, soon())
        return found

    def lose_files(self) -> None:
        for folder in self.root.glob("v*"):
            shutil.rmtree(folder)


@pytest.fixture
def learner(tmp_path: Path) -> Iterator[Learner]:
    learner = Learner(tmp_path / "weights")
    yield learner
    for server in learner.servers:
        server.close()


@pytest.fixture
def node(tmp_path: Path, learner: Learner) -> Iterator[Callable[[str], Mirror]]:
    mirrors: list[Mirror] = []

    def build(name: str) -> Mirror:
        server = ShardServer(name, "127.0.0.1", 30.0, learner.told.append)
        copies = NodeCopies(learner.root, tmp_path / "copies" / name)
        carrier = ThreadCarrier(learner.root, name, server)
        mirrors.append(Mirror(name, learner.planner, copies, carrier))
        return mirrors[-1]

    yield build
    for mirror in mirrors:
        mirror.close()


def read(mirror: Mirror, version: WeightVersion) -> dict[str, Any]:
    here = mirror.bring(version, Deadline(f"bringing {version.version}", 30.0))
    assert "copies" in Path(here.path).parts
    return dict(store.read(here.path, expected_digest=version.digest))


def test_readers_take_a_version_from_the_ranks_and_each_other_and_the_storage_gives_nothing(
    learner: Learner, node: Callable[[str], Mirror]
) -> None:
    version = learner.publish(1, seed=1)
    learner.lose_files()  # nobody asks for them
    for name in ("a", "b", "c"):
        assert_same(read(node(name), version), small_model(seed=1))
    assert None not in learner.planner.sources
    assert {"learner-0", "learner-1"} <= set(learner.planner.sources)


def test_a_rank_holds_its_newest_shard_and_nobody_is_sent_to_an_older_one(
    learner: Learner, node: Callable[[str], Mirror]
) -> None:
    first = learner.publish(1, seed=1)
    second = learner.publish(2, seed=2)
    assert [len(server.held) for server in learner.servers] == [2, 1], "the manifest and a shard"
    assert_same(read(node("a"), first), small_model(seed=1))
    assert set(learner.planner.sources) == {None}, "from the files"
    assert_same(read(node("b"), second), small_model(seed=2))


def test_between_two_versions_nobody_is_sent_to_what_is_about_to_go(
    learner: Learner, node: Callable[[str], Mirror]
) -> None:
    version = learner.publish(1, seed=1)
    for lender in learner.lenders:
        lender.withdraw(soon())
    assert all(server.held for server in learner.servers), "for readers that are on their way"
    assert_same(read(node("a"), version), small_model(seed=1))
    assert set(learner.planner.sources) == {None}


def test_a_rank_that_dies_leaves_the_files(learner: Learner, node: Callable[[str], Mirror]) -> None:
    version = learner.publish(1, seed=1)
    for server in learner.servers:
        server.close()
    assert_same(read(node("a"), version), small_model(seed=1))
    assert None in learner.planner.sources


def test_a_shard_that_is_lent_damaged_is_refused_and_then_read_from_the_files(
    learner: Learner, node: Callable[[str], Mirror]
) -> None:
    version = learner.publish(1, seed=1)
    (key, chunks) = next(iter(learner.servers[1].held.items()))
    damaged = bytearray(chunks[-1])
    damaged[-1] ^= 1
    learner.servers[1].held[key] = (*chunks[:-1], memoryview(damaged))
    mirror = node("a")
    with pytest.raises(WeightError, match="damaged"):
        read(mirror, version)
    mirror.distrust(1)
    assert_same(read(mirror, version), small_model(seed=1))


def test_the_learner_may_change_its_memory_as_soon_as_a_shard_is_lent(learner: Learner) -> None:
    memory = bytearray(b"weights")
    learner.lenders[0].lend(1, "shard", ShardImage(chunks=(memoryview(memory),)), soon())
    memory[:] = b"changed"
    [chunks] = learner.servers[0].held.values()
    assert bytes(chunks[0]) == b"weights"


def test_a_shard_that_is_written_again_takes_the_place_of_the_first(learner: Learner) -> None:
    for text in (b"first", b"again"):
        learner.lenders[0].lend(1, "shard", ShardImage(chunks=(memoryview(text),)), soon())
    [chunks] = learner.servers[0].held.values()
    assert bytes(chunks[0]) == b"again"
    found = learner.planner.plan.next("a", [Piece(1, "shard")])
    assert found is not None
    assert found.address.key in learner.servers[0].held


def test_neither_a_planner_that_is_gone_nor_a_full_memory_costs_the_version(tmp_path: Path) -> None:
    def full(chunk: memoryview) -> memoryview:
        raise MemoryError

    for options, gone, says in (({}, True, "lends nothing"), ({"copy": full}, False, "no memory")):
        learner = Learner(tmp_path / f"gone {gone}", **options)
        learner.planner.gone = gone
        version = learner.publish(1, seed=1)
        assert_same(dict(store.read(version.path)), small_model(seed=1))
        assert any(says in text for text in learner.told)
        assert gone or not any(server.held for server in learner.servers)
        for server in learner.servers:
            server.close()


class Recorder:
    """Planner and server of one lender, in a process whose time is `now`. Each call is recorded."""

    def __init__(self) -> None:
        self.now, self.calls, self.told = 0.0, list[str](), list[str]()
        self.hangs = False
        self.on_call: Callable[[], None] = lambda: None
        self.lender = ShardLender("learner", self, self, self.copied, self.told.append)  # type: ignore[arg-type]
        self._num_lent = 0

    def copied(self, chunk: memoryview) -> memoryview:
        self.now += 1.0
        return chunk

    def deadline(self, seconds: float) -> Deadline:
        return Deadline("lending", seconds, lambda: self.now)

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]], timeout_s: float) -> None:
        self.calls.append(f"list {[piece.version for piece, _ in pieces]}")
        self.on_call()
        if self.hangs:
            self.now += reply_deadline(timeout_s)
            raise WeightError("relay:x cannot be reached")

    def lend(self, chunks: Sequence[memoryview]) -> Any:
        self._num_lent += 1
        return Served(server="learner", host="", port=0, key=self._num_lent, token="")

    def drop(self, keys: Sequence[int]) -> None:
        self.calls += [f"drop {key}" for key in keys]

    def write(self, version: int, num_chunks: int = 1, seconds: float = 60.0) -> None:
        image = ShardImage(chunks=num_chunks * (memoryview(b"weights"),))
        self.lender.lend(version, "shard", image, self.deadline(seconds))


@pytest.mark.parametrize("seconds", [1.0, 4.0, 10.0, 270.0])
def test_a_planner_that_hangs_takes_no_time_that_the_publish_needs(seconds: float) -> None:
    run = Recorder()
    run.hangs = True
    deadline = run.deadline(seconds)
    run.lender.withdraw(deadline)
    assert run.now <= WITHDRAW_SHARE * seconds
    run.lender.sink(deadline).write(1, "shard", ShardImage(chunks=(memoryview(b"weights"),)))
    assert run.now <= max(seconds, 1.0 + WITHDRAW_SHARE * seconds), "the copy takes a second"
    assert all(text.startswith("learner lends nothing: ") for text in run.told)


def test_a_copy_that_takes_longer_than_the_publish_may_is_not_made_to_its_end() -> None:
    run = Recorder()
    run.write(1, num_chunks=100, seconds=5.0)
    assert run.now == 5.0
    assert run.calls == []
    assert "waiting for a copy of shard" in run.told[0]


def test_no_shard_is_freed_while_the_plan_lists_it() -> None:
    """A late thread of the publish before lends its shard after the next one has withdrawn it."""
    run = Recorder()
    run.write(1)
    run.lender.withdraw(run.deadline(60.0))
    run.write(1)
    run.write(2)
    assert run.calls == [
        "list [1]",
        "list []",
        "list [1]",
        "drop 1",
        "list []",
        "drop 2",
        "list [2]",
    ]


def test_a_withdrawal_never_comes_between_a_shard_that_is_lent_and_its_listing() -> None:
    run = Recorder()

    def withdraw_meanwhile() -> None:
        run.on_call = lambda: None
        run.lender.withdraw(Deadline("withdrawing", 0.1))

    run.on_call = withdraw_meanwhile
    run.write(1)
    assert run.calls == ["list [1]"]
    assert "waiting for another thread that lends a shard" in run.told[0]
    run.lender.withdraw(run.deadline(60.0))
    assert run.calls == ["list [1]", "list []"]
