"""The object store as a transport of weights: what is its own beside what all promise."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights import store
from rlhf_cluster.weights.transports.shared_memory import (
    EdgeBlob,
    MemoryBlob,
)
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.builders.small_weights import (
    assert_same,
    small_model,
)
from tests.support.builders.weight_transports import ObjectStand


@pytest.fixture
def objects(tmp_path: Path) -> ObjectStand:
    return ObjectStand(tmp_path)


@pytest.mark.parametrize("position", range(8))
def test_chunks_read_as_one_run_of_bytes(position: int) -> None:
    blob = MemoryBlob("here", [b"", b"abc", b"", b"d", b"efgh", b""])
    for length in range(8 - position + 1):
        target = bytearray(length)
        blob.read_into(memoryview(target), position)
        assert bytes(target) == b"abcdefgh"[position : position + length]
    with pytest.raises(WeightError, match="here: ends at byte 8, expected 9 bytes"):
        blob.read_into(memoryview(bytearray(9)), position)


def test_edges_give_what_the_commit_reads_and_nothing_else() -> None:
    blob = EdgeBlob("here", 100, {8: b"abc"})
    target = bytearray(3)
    blob.read_into(memoryview(target), 8)
    assert bytes(target) == b"abc"
    for position, length in ((8, 2), (9, 3)):
        with pytest.raises(WeightError, match=f"here: has .* bytes for the commit at {position}"):
            blob.read_into(memoryview(bytearray(length)), position)


def test_a_commit_fetches_the_edges_and_no_shard(objects: ObjectStand) -> None:
    _, stored = objects.write(1, small_model())
    objects.commit(1, stored)
    assert set(objects.objects.fetched) == {shard.edges for shard in stored}
    sizes = [
        sum(len(chunk) for shard in stored for chunk in objects.objects.held[handle(shard)])
        for handle in (lambda s: s.edges, lambda s: s.data)
    ]
    assert sizes[0] < 0.9 * sizes[1], "two border chunks a tensor, and headers"


def test_lost_objects_of_a_durable_version_are_read_from_its_files(objects: ObjectStand) -> None:
    version = objects.publish(1, small_model(), durable=True)
    for shard in objects.shards(version):
        objects.lose(shard)
    assert_same(dict(objects.read(version)), small_model())
    assert_same(dict(store.read(version.path, expected_digest=version.digest)), small_model())


def test_a_lost_version_without_files_says_so(objects: ObjectStand) -> None:
    objects.publish(0, small_model(), durable=True)
    version = objects.publish(1, small_model(1))
    assert not Path(version.path).exists()
    objects.lose(objects.shards(version)[0])
    with pytest.raises(WeightError, match=r"v000001: its shards in the object store are lost, and"):
        dict(objects.read(version))


def test_a_directory_that_lost_its_memory_still_leads_to_the_files(objects: ObjectStand) -> None:
    durable = objects.publish(0, small_model(), durable=True)
    lost = objects.publish(1, small_model(1))
    objects.directory.clear()
    assert_same(dict(objects.read(durable)), small_model())
    assert not objects.source.has(1)
    with pytest.raises(WeightError, match="neither the object store nor the file store"):
        objects.read(lost)
    objects.publish(2, small_model(2))
    assert objects.find() == [2]


def test_a_cleared_directory_takes_an_earlier_version_with_other_weights(
    objects: ObjectStand,
) -> None:
    for number in (1, 2):
        objects.publish(number, small_model(number))
    with pytest.raises(WeightError, match="publishing goes forward"):
        objects.publish(1, small_model(7))
    objects.directory.clear()
    anew = objects.publish(1, small_model(7))
    assert objects.find() == [1]
    assert_same(dict(objects.read(anew)), small_model(7))


def test_a_cancelled_read_does_not_turn_to_the_files(objects: ObjectStand) -> None:
    version = objects.publish(1, small_model(), durable=True)
    deadline = Deadline("reading version 1", 10.0)
    deadline.cancel()
    with pytest.raises(WeightError, match="was cancelled"):
        objects.source.open(1, [name for _, name in objects.shards(version)], deadline)


def test_nothing_refers_to_versions_that_retention_let_go(objects: ObjectStand) -> None:
    for number in range(6):
        objects.publish(number, small_model(number), keep=2)
    entries: Callable[[int], Any] = objects.directory.find
    assert [number for number in range(6) if entries(number) is not None] == [4, 5]
    sizes = objects.directory.sizes()
    assert set(sizes) == {4, 5}
    assert len(set(sizes.values())) == 1
