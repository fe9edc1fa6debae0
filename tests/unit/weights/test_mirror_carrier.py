"""Reads of a storage that hangs, in threads that are given up."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.mirror_carrier import MAX_HUNG, ThreadCarrier, finish
from rlhf_cluster.weights.transports.mirror_ports import NoProgress
from rlhf_cluster.weights.transports.rank_memory import ShardServer
from rlhf_cluster.weights.transports.relay_plan import Piece
from rlhf_cluster.weights.transports.shared_files import version_dir


@pytest.fixture
def pipe(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """File "shard" of version 1, which gives what is written to the descriptor, and has no end."""
    path = version_dir(tmp_path / "weights", 1) / "shard"
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    fd = os.open(path, os.O_RDWR)
    yield path, fd
    os.close(fd)


def test_n13_a_read_is_given_up_when_nothing_comes_and_not_when_it_takes_long(pipe) -> None:
    path, fd = pipe
    now, got = 0.0, bytearray()

    class Copied:
        def write(self, data: bytes) -> None:
            nonlocal now
            got.extend(data)
            now += 0.9  # and more in all than what nothing may take
            if len(got) < 5:
                os.write(fd, b"x")

    def clock() -> float:
        nonlocal now
        now += 0.001 if len(got) < 5 else 0.5
        return now

    server = ShardServer("a", "127.0.0.1", 30.0)
    carrier = ThreadCarrier(path.parents[1], "a", server, clock=clock)
    os.write(fd, b"x")
    with pytest.raises(NoProgress, match="nothing was read for 1 s"):
        finish(carrier.from_storage(Piece(1, "shard"), Copied(), 1.0, lambda: 60.0))
    assert got == b"xxxxx"
    carrier.close()


def test_n13_a_storage_that_is_gone_for_good_takes_no_more_threads_than_the_bound(pipe) -> None:
    path, _ = pipe
    server = ShardServer("a", "127.0.0.1", 30.0)
    carrier = ThreadCarrier(path.parents[1], "a", server)

    def read() -> None:
        finish(carrier.from_storage(Piece(1, "shard"), None, 0.0, lambda: 60.0))

    for _ in range(MAX_HUNG):
        with pytest.raises(NoProgress):
            read()
    with pytest.raises(WeightError, match=f"{MAX_HUNG} reads of that storage hang"):
        read()
    carrier.close()
