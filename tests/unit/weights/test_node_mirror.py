"""A node's copy of the versions: brought once a node, from others where they have it, and whole."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.mirror_carrier import ThreadCarrier
from rlhf_cluster.weights.transports.mirror_folder import NodeCopies, sweep
from rlhf_cluster.weights.transports.node_mirror import Mirror
from rlhf_cluster.weights.transports.rank_memory import Served, ShardServer
from rlhf_cluster.weights.transports.relay_plan import (
    Assignment,
    Piece,
    RelayPlan,
)
from rlhf_cluster.weights.transports.shared_files import MANIFEST_NAME
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.builders.small_weights import (
    assert_same,
    publish,
    small_model,
)


class Planner:
    """The plan in this process; it counts where files came from, and can be out of reach."""

    def __init__(self) -> None:
        self.plan, self.sources, self.failures = (
            RelayPlan(streams=2, uploads=2),
            list[str | None](),
            list[Any](),
        )
        self.lock, self.gone = threading.Lock(), False
        self.on_failure: Callable[[str, Piece], None] = lambda node, piece: None

    def exchange(
        self, node: str, wanted: Sequence[Piece], done: Sequence[Any], failed: Sequence[Any]
    ) -> Assignment | None:
        if self.gone:
            raise WeightError("the planner cannot be reached")
        with self.lock:
            for piece, address in done:
                self.plan.done(node, piece, address)
            for piece, source in failed:
                self.failures.append((piece, source))
                self.plan.failed(node, piece, source)
                self.on_failure(node, piece)
            found = self.plan.next(node, wanted) if wanted else None
            if found is not None:
                self.sources.append(found.source)
            return found

    def keeps(self, node: str, versions: Sequence[int]) -> None:
        with self.lock:
            self.plan.keeps(node, versions)


class Node:
    def __init__(
        self,
        folder: Path,
        name: str,
        planner: Planner,
        host: str | None = None,
        lease_s: float = 120.0,
    ) -> None:
        self.server = ShardServer(name, "127.0.0.1", 30.0, told=lambda text: None)
        self.room, self.told = 1 << 40, list[str]()
        self.free: Callable[[Path], int] = lambda folder: self.room
        root = folder / "weights"
        copies = NodeCopies(root, folder / (host or name), lambda folder: self.free(folder))
        carrier = ThreadCarrier(root, name, self.server)
        self.mirror = Mirror(name, planner, copies, carrier, lease_s, self.told.append)
        self.local = copies.local

    def bring(self, version: WeightVersion, seconds: float = 30.0) -> WeightVersion:
        return self.mirror.bring(version, Deadline(f"bringing {version.version}", seconds))

    def read(self, version: WeightVersion) -> dict[str, Any]:
        here = self.bring(version)
        assert Path(here.path).is_relative_to(self.local)
        return dict(store.read(here.path, expected_digest=version.digest))

    def read_anywhere(self, version: WeightVersion) -> dict[str, Any]:
        return dict(store.read(self.bring(version).path, expected_digest=version.digest))


@pytest.fixture
def planner() -> Planner:
    return Planner()


@pytest.fixture
def node(tmp_path: Path, planner: Planner) -> Iterator[Callable[..., Node]]:
    with contextlib.ExitStack() as stack:

        def build(name: str, host: str | None = None, **limits: float) -> Node:
            node = Node(tmp_path, name, planner, host, **limits)
            stack.callback(node.mirror.close)
            return node

        yield build


def test_nodes_read_what_was_published_and_the_storage_gives_each_file_once(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    for name in ("a", "b", "c"):
        assert_same(node(name).read(version), small_model(seed=1))
    assert planner.sources.count(None) == 3, "two shards and the manifest"
    assert len(planner.sources) == 9


def test_readers_of_one_node_bring_a_version_once(tmp_path: Path, node, planner: Planner) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    readers = [node(f"reader {i}", host="one") for i in range(4)]
    with ThreadPoolExecutor(4) as threads:
        for found in threads.map(lambda reader: reader.read(version), readers):
            assert_same(found, small_model(seed=1))
    assert len(planner.sources) == 3


def test_a_chain_is_brought_whole_and_only_what_is_new_and_what_is_not_needed_is_removed(
    tmp_path: Path, node, planner: Planner
) -> None:
    first, second = small_model(seed=1), small_model(seed=1)
    second["model.norm.weight"] = second["model.norm.weight"] + 1
    root, one = tmp_path / "weights", node("a")
    one.read(publish(root, 1, first))
    planner.sources.clear()
    version = publish(root, 2, second, base=(1, first))
    assert_same(one.read(version), second)
    assert len(planner.sources) == 3, "of the second version alone"
    assert sorted(f.name for f in one.local.glob("v*")) == ["v000001", "v000002"]
    one.read(publish(root, 3, first))
    assert sorted(f.name for f in one.local.glob("v*")) == ["v000003"]
    assert_same(node("late").read(publish(root, 4, second, base=(3, first))), second)


def flip_last_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_a_damaged_copy_is_brought_again_from_the_storage_once_a_node(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    readers = [node(f"reader {i}", host="one") for i in range(2)]
    for reader in readers:
        reader.bring(version)
    node("peer").bring(version)
    [shard, *_] = sorted(readers[0].local.glob("v000001/*.safetensors"))
    flip_last_bit(shard)
    for reader in readers:
        with pytest.raises(WeightError, match="damaged"):
            reader.read(version)
        reader.mirror.distrust(1)
    planner.sources.clear()
    for reader in readers:
        assert_same(reader.read(version), small_model(seed=1))
    assert planner.sources == [None] * 3, "a peer may have the damage too"


def test_a_version_that_all_nodes_find_damaged_is_read_from_the_storage_once_for_all_of_them(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    [shard, *_] = sorted((tmp_path / "weights" / "v000001").glob("*.safetensors"))
    flip_last_bit(shard)
    readers = [node(f"reader {i}", host=f"host {i // 2}") for i in range(6)]
    for is_last in (False, False, True):
        planner.sources.clear()
        if is_last:
            flip_last_bit(shard)
        for reader in readers:
            reader.bring(version)
        assert planner.sources.count(None) == 3, "two shards and the manifest"
        assert len(planner.sources) == 9, "once per node"
        for reader in readers:
            if is_last:
                assert_same(reader.read(version), small_model(seed=1))
            else:
                with pytest.raises(WeightError, match="damaged"):
                    reader.read(version)
        for reader in readers:
            reader.mirror.distrust(1)
    assert planner.failures == [], "no reader was sent to a copy that was removed"


def test_no_reader_is_sent_to_a_copy_that_its_node_distrusts(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one = node("one")
    one.bring(version)
    one.mirror.distrust(1)
    one.bring(version)
    planner.sources.clear()
    assert_same(node("new").read(version), small_model(seed=1))
    assert planner.sources == [None] * 3
    assert planner.failures == []


def test_a_fetch_that_is_tried_again_after_damage_still_takes_no_damaged_copy(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one = node("one")
    one.bring(version)
    node("peer").bring(version)
    one.mirror.distrust(1)
    shards = tmp_path / "weights" / "v000001"
    shards.rename(shards.with_name("away"))
    with pytest.raises(WeightError, match="there is no such version"):
        one.bring(version)
    shards.with_name("away").rename(shards)
    planner.sources.clear()
    one.bring(version)
    assert planner.sources == [None] * 3


def test_a_version_of_the_same_number_by_another_learner_replaces_the_copy(
    tmp_path: Path, node, planner: Planner
) -> None:
    one = node("a")
    one.read(publish(tmp_path / "weights", 1, small_model(seed=1)))
    (tmp_path / "weights").rename(tmp_path / "lost")
    version = publish(tmp_path / "weights", 1, small_model(seed=2))
    assert_same(one.read(version), small_model(seed=2))
    assert_same(node("b").read(version), small_model(seed=2))


def test_a_peer_that_is_gone_costs_nothing_but_its_tries(tmp_path: Path, node, planner) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    gone = node("gone")
    gone.read(version)
    gone.server.close()
    assert_same(node("b").read(version), small_model(seed=1))
    assert planner.failures
    assert {source for _, source in planner.failures} == {"gone"}


def test_without_its_planner_a_node_reads_the_storage(tmp_path: Path, node, planner) -> None:
    planner.gone = True
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    assert_same(node("a").read(version), small_model(seed=1))


def test_a_version_that_is_gone_is_refused_and_a_truncated_file_named(
    tmp_path: Path, node, planner
) -> None:
    one = node("a")
    first = publish(tmp_path / "weights", 1, small_model(seed=1))
    one.bring(first)
    second = publish(tmp_path / "weights", 2, small_model(seed=2))
    [shard, *_] = sorted((tmp_path / "weights" / "v000002").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-4])
    with pytest.raises(
        WeightError, match=r"\.safetensors of version 2 has \d+ bytes in .*expected"
    ):
        one.bring(second)
    assert_same(one.read(first), small_model(seed=1))
    missing = WeightVersion(
        version=9,
        path=str(tmp_path / "weights/v000009"),
        digest="0" * 32,
        num_tensors=3,
        num_bytes=9,
    )
    with pytest.raises(WeightError, match="there is no such version"):
        one.bring(missing)


def test_a_turn_that_never_comes_ends_with_the_deadline(tmp_path: Path, node, planner) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    planner.plan.next("hangs", [Piece(1, MANIFEST_NAME)])
    with pytest.raises(StalledError, match=r"waiting for (its turn at a source|some of 1 files)"):
        node("a").bring(version, seconds=0.1)


def test_files_of_runs_that_have_ended_are_removed_and_those_in_use_are_not(
    tmp_path: Path, node, planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one, other = node("a", host="one"), node("b", host="one")
    one.bring(version)
    other.bring(version)
    one.mirror.close()
    sweep(one.local.parent)
    assert other.local.is_dir(), "another reader of the node uses them"
    other.mirror.close()
    assert list(one.local.parent.iterdir()) == []


def test_n02_a_store_in_the_folder_of_the_mirror_survives_it(
    tmp_path: Path, planner: Planner
) -> None:
    """One folder for both, with the run's own name beside the copies."""
    shared = tmp_path / "weights"
    versions = [publish(shared, n, small_model(seed=n)) for n in (1, 2)]
    one = Node(tmp_path, "a", planner, host="weights")
    for version in versions:
        one.read(version)
    one.mirror.close()
    for n, version in enumerate(versions, 1):
        found = store.read(version.path, expected_digest=version.digest)
        assert_same(dict(found), small_model(seed=n))
    assert sorted(f.name for f in shared.glob("v*")) == ["v000001", "v000002"]


def test_n02_a_folder_that_was_removed_under_the_reader_is_made_again(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one = node("a")
    one.bring(version)
    shutil.rmtree(one.local)
    assert_same(one.read(version), small_model(seed=1))
    sweep(one.local.parent)
    assert one.local.is_dir(), "it is in use again"


def held_by(readers: Sequence[Node]) -> list[list[int]]:
    """Sizes of the files that each of them serves, which stay in memory while it does."""
    return [sorted(len(c) for cs in r.server.held.values() for c in cs) for r in readers]


def test_n01_readers_that_take_turns_hold_no_version_but_the_newest(
    tmp_path: Path, node, planner: Planner
) -> None:
    readers = [node(f"reader {i}", host="one") for i in range(2)]
    root = tmp_path / "weights"
    for number in range(1, 7):
        version = publish(root, number, small_model(seed=number))
        for reader in (readers[number % 2], readers[1 - number % 2]):
            reader.bring(version)
        sizes = sorted(f.stat().st_size for f in readers[0].local.glob(f"v{number:06d}/*"))
        assert held_by(readers)[number % 2] == sizes
        assert held_by(readers)[1 - number % 2] == []


def test_n01_a_copy_that_another_reader_replaced_is_served_no_more(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    readers = [node(f"reader {i}", host="one") for i in range(2)]
    readers[0].bring(version)
    readers[1].bring(version)
    readers[1].mirror.distrust(1)
    readers[1].bring(version)
    readers[0].bring(version)
    sizes = sorted(f.stat().st_size for f in readers[0].local.glob("v000001/*"))
    assert held_by(readers) == [[], sizes]


def test_n01_a_file_that_is_lent_again_is_held_once(tmp_path: Path, node, planner: Planner) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one = node("a")
    for _ in range(3):
        one.bring(version)
        shutil.rmtree(one.local / "v000001")
    one.bring(version)
    assert held_by([one]) == [sorted(f.stat().st_size for f in one.local.glob("v000001/*"))]


def partials(one: Node) -> list[str]:
    return [f.name for f in one.local.rglob("*.partial")]


def test_n12_a_disk_without_room_costs_the_copy_and_not_the_version(
    tmp_path: Path, node, planner: Planner
) -> None:
    root, one = tmp_path / "weights", node("a")
    one.read(publish(root, 1, small_model(seed=1)))
    second = publish(root, 2, small_model(seed=2))
    one.room = second.num_bytes // 2
    planner.sources.clear()
    assert one.bring(second) == second, "to be read where it was published"
    assert_same(one.read_anywhere(second), small_model(seed=2))
    assert set(planner.sources) <= {None}
    assert len(planner.sources) <= 2, "the manifest, and no file that does not fit"
    assert list(one.local.glob("v*")) == [], "the older version made room"
    assert "are free" in one.told[0]
    one.room = 1 << 40
    assert_same(one.read(publish(root, 3, small_model(seed=3))), small_model(seed=3))


def test_n12_an_older_version_makes_room_for_a_newer_one(tmp_path: Path, node) -> None:
    root, one = tmp_path / "weights", node("a")
    one.read(publish(root, 1, small_model(seed=1)))
    second = publish(root, 2, small_model(seed=2))

    def free(folder: Path) -> int:
        return 0 if (one.local / "v000001").exists() else 1 << 40

    one.free = free
    assert_same(one.read(second), small_model(seed=2))
    assert one.told == []


def test_n12_a_disk_that_breaks_off_leaves_no_parts_and_the_storage_is_read(
    tmp_path: Path, node, planner: Planner
) -> None:
    """The file system allows no file of more than a third of a shard here."""
    root, one = tmp_path / "weights", node("a")
    version = publish(root, 1, small_model(seed=1))
    largest = max(f.stat().st_size for f in (root / "v000001").iterdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest // 3, before[1]))
    try:
        assert one.bring(version) == version
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large" in one.told[0]
    assert list(one.local.glob("v*")) == []
    assert_same(one.read(version), small_model(seed=1))


def test_n12_a_mirror_without_its_folder_reads_the_storage(tmp_path: Path, node, planner) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one = node("a")
    one.local.parent.mkdir()
    one.local.write_text("somebody's")
    assert_same(one.read_anywhere(version), small_model(seed=1))
    assert "Move it away" in one.told[0]
    assert one.local.read_text() == "somebody's"


def test_n12_a_copy_of_the_manifest_that_is_damaged_is_brought_again(
    tmp_path: Path, node, planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    one = node("a")
    one.bring(version)
    manifest = one.local / "v000001" / MANIFEST_NAME
    manifest.write_bytes(bytes(manifest.stat().st_size))
    assert_same(one.read(version), small_model(seed=1))


def hanging(shard: Path) -> Callable[[], None]:
    """Whoever opens `shard` hangs until what is returned is called."""
    shard.unlink()
    os.mkfifo(shard)
    return lambda: os.close(os.open(shard, os.O_RDWR | os.O_NONBLOCK))


def test_n13_a_read_that_hangs_ends_with_its_deadline_and_so_does_its_hold_of_the_node(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    node("peer").bring(version)
    [shard, *_] = sorted((tmp_path / "weights" / "v000001").glob("*.safetensors"))
    let_go = hanging(shard)
    hangs, other = node("hangs", host="one"), node("other", host="one")
    planner.gone = True
    with pytest.raises(StalledError, match="bringing 1 was not over after 0.3 s"):
        hangs.bring(version, seconds=0.3)
    planner.gone = False
    assert_same(other.read(version), small_model(seed=1))
    late = [t for t in threading.enumerate() if t.name.startswith("hangs-mirror")]
    assert late, "it hangs still"
    assert all(t.daemon for t in late), "it does not hold up the end of the process"
    let_go()
    for thread in late:
        thread.join(20.0)
        assert not thread.is_alive()
    assert partials(other) == []
    assert_same(other.read(version), small_model(seed=1))


def test_n13_readers_of_one_node_get_from_a_peer_what_the_storage_does_not_give(
    tmp_path: Path, node, planner: Planner
) -> None:
    """All of them ask at one moment, and have one deadline."""
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    apart = Planner()
    peer = Node(tmp_path, "peer", apart)
    peer.bring(version)
    [shard, *_] = sorted((tmp_path / "weights" / "v000001").glob("*.safetensors"))
    let_go = hanging(shard)
    piece = Piece(1, shard.name)
    with apart.lock:
        lent = apart.plan.next("anyone", [piece])
    assert lent is not None

    def failed(name: str, lost: Piece) -> None:
        if lost == piece:
            planner.plan.done("peer", piece, lent.address)

    planner.on_failure = failed
    readers = [node(f"reader {i}", host="one", lease_s=0.3) for i in range(3)]
    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(lambda reader: reader.read(version), readers):
            assert_same(found, small_model(seed=1))
    assert planner.failures == [(piece, None)], "the storage is no node's fault"
    assert planner.sources[-1] == "peer"
    assert partials(readers[0]) == []
    let_go()
    peer.mirror.close()


def test_n13_parts_that_a_lost_reader_left_are_removed_by_the_next_one(
    tmp_path: Path, node, planner
) -> None:
    one = node("a")
    one.bring(publish(tmp_path / "weights", 1, small_model(seed=1)))
    (one.local / "v000001" / ".shard.0123abcd.partial").write_bytes(b"half")
    one.bring(publish(tmp_path / "weights", 2, small_model(seed=1), base=(1, small_model(seed=1))))
    assert (one.local / "v000001").is_dir()
    assert partials(one) == []


@pytest.fixture
def silent(planner: Planner) -> Iterator[None]:
    """Node "silent" has the manifest of version 1, takes every connection, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        address = Served(server="silent", host="127.0.0.1", port=port, key=1, token="secret")
        planner.plan.done("silent", Piece(1, MANIFEST_NAME), address)
        yield


@pytest.mark.usefixtures("silent")
def test_n03_a_reader_whose_own_deadline_passes_says_nothing_against_its_source(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    for name in ("a", "b", "c"):
        with pytest.raises(StalledError):
            node(name).bring(version, seconds=0.3)
    assert planner.sources == ["silent"] * 3, "it was believed each time"
    assert planner.failures == [(Piece(1, MANIFEST_NAME), None)] * 3, "and each gave its turn back"


@pytest.mark.usefixtures("silent")
def test_n03_a_source_that_outlasts_its_lease_is_named_and_another_one_serves(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    assert_same(node("a", lease_s=0.2).read(version), small_model(seed=1))
    assert planner.failures == [(Piece(1, MANIFEST_NAME), "silent")]


def test_n03_a_reader_whose_disk_fails_says_nothing_against_its_source(
    tmp_path: Path, node, planner: Planner
) -> None:
    version = publish(tmp_path / "weights", 1, small_model(seed=1))
    node("peer").bring(version)
    one = node("a")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1, before[1]))
    try:
        assert one.bring(version) == version
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert planner.sources[-1] == "peer"
    assert planner.failures == [(Piece(1, MANIFEST_NAME), None)]
