"""What a store of weights must find and promise, whatever carries its files."""

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.tensor_hashing import compute_digest
from rlhf_cluster.weights import store
from rlhf_cluster.weights.read_version import Held
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardImage,
)
from tests.support.builders.small_weights import (
    assert_same,
    small_model,
    stepped,
)
from tests.support.builders.weight_transports import (
    Stand,
    flip,
)

NAME = "model.embed_tokens.weight"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def stand(tmp_path: Path) -> Stand:
    return Stand(tmp_path)


def publish_chain(
    stand: Stand, length: int, num_ranks: int = 2, keep: int = 10
) -> tuple[list[WeightVersion], list[Tensors]]:
    """Version 0 in full and `length - 1` differences, each from the one before; with its tensors."""
    tensors = [small_model()]
    versions = [stand.publish(0, tensors[0], num_ranks, keep)]
    for number in range(1, length):
        tensors.append(stepped(tensors[-1], seed=number))
        base = (number - 1, tensors[-2])
        versions.append(stand.publish(number, tensors[-1], num_ranks, keep, base))
    return versions, tensors


def header_end(data: bytes | bytearray) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def position_of(data: bytes | bytearray, name: str) -> tuple[int, int]:
    start = header_end(data)
    a, b = json.loads(data[8:start])[name]["data_offsets"]
    return start + a, start + b


# Versions


def test_what_was_published_is_what_is_read_in_full_and_as_a_chain(stand: Stand) -> None:
    versions, tensors = publish_chain(stand, 4)
    for version, expected in zip(versions, tensors, strict=True):
        assert_same(dict(stand.read(version)), expected)
        assert version.digest == compute_digest(expected.items())
    held = Held(version=1, digest=versions[1].digest, tensors=dict(tensors[1]))
    for shard in (*stand.shards(versions[0]), *stand.shards(versions[1])):
        stand.lose(shard)
    assert_same(dict(stand.read(versions[3], held=held)), tensors[3])


def test_retention_keeps_the_newest_and_what_they_build_on(stand: Stand) -> None:
    publish_chain(stand, 4, keep=2)
    assert stand.find() == [0, 1, 2, 3]
    stand.publish(4, small_model(4), keep=2)
    assert stand.find() == [0, 1, 2, 3, 4]
    stand.publish(5, small_model(5), keep=2)
    assert stand.find() == [4, 5]


def test_a_version_never_changes_and_publishing_goes_forward(stand: Stand) -> None:
    version = stand.publish(5, small_model())
    assert stand.publish(5, small_model(), num_ranks=2) == version
    with pytest.raises(WeightError, match="version 5 is already published with digest"):
        stand.publish(5, small_model(1))
    with pytest.raises(WeightError, match="version 4 is older than the latest, 5"):
        stand.publish(4, small_model(1))
    assert_same(dict(stand.read(version)), small_model())


def test_a_damaged_version_that_is_published_again_is_whole(stand: Stand) -> None:
    version = stand.publish(1, small_model())
    (first, second) = stand.shards(version)
    flip(stand, first, len(stand.load(first)) - 1)
    stand.lose(second)
    with pytest.raises(WeightError):
        dict(stand.read(version))
    assert stand.publish(1, small_model()) == version
    assert_same(dict(stand.read(version)), small_model())


def test_a_difference_that_lost_a_shard_is_mended_by_the_same_version_in_full(stand: Stand) -> None:
    """What a synchronous run does: the learner has no newer version to publish."""
    versions, tensors = publish_chain(stand, 3)
    stand.lose(stand.shards(versions[2])[0])
    with pytest.raises(WeightError):
        dict(stand.read(versions[2]))
    again = stand.publish(2, tensors[2])
    assert again.digest == versions[2].digest
    assert_same(dict(stand.read(again)), tensors[2])
    assert stand.find() == [0, 1, 2]
    assert_same(dict(stand.read(versions[1])), tensors[1])


def test_a_base_that_is_gone_is_refused_before_anything_changes(stand: Stand) -> None:
    tensors = small_model()
    stand.publish(5, tensors)
    _, written = stand.write(6, stepped(tensors, 1), base=(4, tensors))
    with pytest.raises(
        WeightError, match=r"version 6 builds on version 4.*Publish it as a full snapshot"
    ):
        stand.commit(6, written)
    assert stand.find() == [5]


def test_a_reader_that_started_before_a_delete_gets_everything(stand: Stand) -> None:
    version = stand.publish(1, small_model())
    reader = stand.read(version)
    first = next(reader)
    stand.publish(2, small_model(2), keep=1)
    assert stand.find() == [2]
    assert_same(dict([first, *reader]), small_model())


def test_a_reader_that_comes_too_late_is_told_to_pull_the_latest(stand: Stand) -> None:
    version = stand.publish(1, small_model())
    reader = stand.read(version)
    stand.publish(2, small_model(2), keep=1)
    with pytest.raises(WeightError, match=r"v000001: there is no such version.*pull the latest"):
        next(reader)
    with pytest.raises(WeightError, match=r"v000001: there is no such version"):
        stand.read(version)


# Damage


def test_a_flipped_bit_names_tensor_and_shard_and_is_never_yielded(stand: Stand) -> None:
    version = stand.publish(1, small_model())
    damaged = stand.shards(version)[1]
    flip(stand, damaged, len(stand.load(damaged)) - 1)
    seen = []
    with pytest.raises(WeightError) as caught:
        seen.extend(name for name, _ in stand.read(version))
    assert damaged.name in str(caught.value)
    named = next(name for name in small_model() if repr(name) in str(caught.value))
    assert named not in seen


def test_every_flipped_byte_of_a_small_version_is_found(stand: Stand) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(3)}
    version = stand.publish(1, tensors, num_ranks=1)
    (shard,) = stand.shards(version)
    for position in range(len(stand.load(shard))):
        flip(stand, shard, position)
        with pytest.raises(WeightError):
            dict(stand.read(version))
        flip(stand, shard, position)
    assert_same(dict(stand.read(version)), tensors)


def test_without_verifying_damage_in_the_data_passes(stand: Stand) -> None:
    """So the hash is what finds it, and nothing else by chance."""
    version = stand.publish(1, small_model())
    shard = stand.shards(version)[0]
    flip(stand, shard, len(stand.load(shard)) - 1)
    assert len(dict(stand.read(version, verify=False))) == 3


@pytest.mark.parametrize("lost", [1, 1000])
def test_a_truncated_shard_is_torn(stand: Stand, lost: int) -> None:
    version = stand.publish(1, small_model())
    damaged = stand.shards(version)[0]
    whole = stand.load(damaged)
    stand.store(damaged, whole[:-lost])
    size = len(whole)
    with pytest.raises(
        WeightError, match=f"{damaged.name}.*: {size - lost} bytes, expected {size}.*torn"
    ):
        dict(stand.read(version))


def test_a_missing_shard_is_named(stand: Stand) -> None:
    version = stand.publish(1, small_model())
    missing = stand.shards(version)[1]
    stand.lose(missing)
    with pytest.raises(WeightError, match=f"{missing}.*is missing"):
        dict(stand.read(version))


def test_two_shards_that_swapped_their_names_are_found(stand: Stand) -> None:
    version = stand.publish(1, small_model())
    first, second = stand.shards(version)
    first_bytes, second_bytes = stand.load(first), stand.load(second)
    stand.store(first, second_bytes)
    stand.store(second, first_bytes)
    with pytest.raises(WeightError, match="shard-00000"):
        dict(stand.read(version))


@pytest.mark.parametrize("is_difference", [False, True])
def test_a_shard_damaged_before_the_commit_is_refused_where_a_chunk_spans_ranks(
    stand: Stand, is_difference: bool
) -> None:
    tensors, base = small_model(), None
    if is_difference:
        stand.publish(0, tensors)
        base = (0, tensors)
    shards, written = stand.write(1, stepped(tensors, 1), base=base)
    # The second rank's share of the matrix begins inside a chunk, which is hashed at the commit.
    data = stand.load(shards[1])
    name = NAME + "#borders" if is_difference else NAME
    flip(stand, shards[1], position_of(data, name)[0])
    with pytest.raises(WeightError, match=r"tensor '.*shard-00001.*damaged"):
        stand.commit(1, written)
    assert stand.find() == ([0] if is_difference else [])


def test_a_shard_torn_or_lost_before_the_commit_is_refused(stand: Stand) -> None:
    shards, written = stand.write(1, small_model())
    stand.store(shards[0], stand.load(shards[0])[:-5])
    with pytest.raises(WeightError, match="torn"):
        stand.commit(1, written)
    stand.lose(shards[0])
    with pytest.raises(WeightError, match="is missing"):
        stand.commit(1, written)
    assert stand.find() == []


@pytest.mark.parametrize("damaged_version", [0, 1])
def test_damage_is_blamed_on_the_version_whose_shard_has_it(
    stand: Stand, damaged_version: int
) -> None:
    versions, tensors = publish_chain(stand, 3)
    shard = stand.shards(versions[damaged_version])[1]
    start, stop = position_of(stand.load(shard), NAME)
    flip(stand, shard, (start + stop) // 2)
    seen = []
    with pytest.raises(WeightError) as caught:
        seen.extend(name for name, _ in stand.read(versions[2]))
    assert repr(NAME) in str(caught.value)
    assert f"{versions[damaged_version].path}/{shard.name}" in str(caught.value)
    assert versions[2].path not in str(caught.value)
    assert NAME not in seen
    flip(stand, shard, (start + stop) // 2)
    assert_same(dict(stand.read(versions[2])), tensors[2])


@pytest.mark.parametrize("lost", [1, 400])
def test_a_truncated_difference_is_torn(stand: Stand, lost: int) -> None:
    versions, _ = publish_chain(stand, 2)
    shard = stand.shards(versions[1])[0]
    stand.store(shard, stand.load(shard)[:-lost])
    with pytest.raises(WeightError, match=f"{shard.name}.*torn"):
        dict(stand.read(versions[1]))


def test_two_differences_that_swapped_their_shards_are_found(stand: Stand) -> None:
    versions, _ = publish_chain(stand, 3, num_ranks=1)
    (first,), (second,) = stand.shards(versions[1]), stand.shards(versions[2])
    first_bytes, second_bytes = stand.load(first), stand.load(second)
    stand.store(first, second_bytes)
    stand.store(second, first_bytes)
    with pytest.raises(WeightError, match=r"v000001/shard-00000"):
        dict(stand.read(versions[2]))


# Deadlines


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("ends_by", ["deadline", "cancel"])
def test_a_read_under_way_ends_with_its_deadline_or_its_cancel(stand: Stand, ends_by: str) -> None:
    version, clock = stand.publish(1, small_model()), Clock()
    deadline = Deadline("generation-0: reading version 1", 10.0, clock)
    reader = store.read(version.path, source=stand.source, deadline=deadline)
    next(reader)
    if ends_by == "cancel":
        deadline.cancel()
        with pytest.raises(
            WeightError, match="reading version 1 was cancelled, waiting for tensor"
        ):
            next(reader)
    else:
        clock.now = 10.0
        with pytest.raises(
            StalledError, match=r"version 1 was not over after 10 s, waiting for te"
        ):
            next(reader)


def test_a_write_past_its_deadline_leaves_nothing_behind(tmp_path: Path) -> None:
    clock = Clock()
    deadline = Deadline("learner-0: the write", 5.0, clock)
    sink, image = FileSink(tmp_path, deadline=deadline), ShardImage(chunks=(memoryview(b"abc"),))
    clock.now = 6.0
    with pytest.raises(StalledError, match="learner-0: the write was not over after 5 s"):
        sink.write(1, "shard-0.safetensors", image)
    assert list((tmp_path / "v000001.partial").iterdir()) == []


def test_a_copy_of_a_deadline_ends_with_it_and_is_cancelled_apart() -> None:
    deadline = Deadline("pull", 100.0)
    copy = pickle.loads(pickle.dumps(deadline))
    assert copy.left_s() == pytest.approx(deadline.left_s(), abs=1.0)
    deadline.cancel()
    assert copy.left_s() > 0


async def test_a_cancelled_pull_returns_when_its_reading_has_stopped() -> None:
    import asyncio

    from rlhf_cluster.generation.engine import read_beside

    deadline = Deadline("reading", 30.0)
    started, stopped = threading.Event(), threading.Event()

    def read() -> None:
        started.set()
        try:
            while True:
                deadline.left_s()
        finally:
            stopped.set()

    pull = asyncio.create_task(read_beside(read, deadline))
    await asyncio.to_thread(started.wait, 10)
    pull.cancel()
    with pytest.raises(asyncio.CancelledError):
        await pull
    assert stopped.is_set()


# Shards in memory


def test_a_shard_is_the_file_that_the_library_would_write(tmp_path: Path) -> None:
    from safetensors.torch import save

    tensors = {
        **small_model(),
        "größe": torch.arange(5),
        "a": torch.ones(3, dtype=torch.int8),
        "b": torch.ones(7, dtype=torch.float64),
        "c": torch.ones(2, dtype=torch.bool),
        "d": torch.ones(2, dtype=torch.uint8),
        "e": torch.ones(3),
        "f": torch.ones(3, dtype=torch.int32),
        "g": torch.ones(3, dtype=torch.float16),
        "h": torch.ones(3, dtype=torch.int16),
        "i": torch.ones(3).to(torch.float8_e5m2),
        "j": torch.ones(3).to(torch.float8_e4m3fn),
    }
    stand = Stand(tmp_path)
    version = stand.publish(0, tensors, num_ranks=1)
    (shard,) = stand.shards(version)
    assert bytes(stand.load(shard)) == save({k: t.reshape(-1) for k, t in tensors.items()})
