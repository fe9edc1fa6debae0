"""Bytes in a process's memory, and how others get them over a socket."""

import dataclasses
import errno
import os
import queue
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.weights.transports import rank_memory
from rlhf_cluster.weights.transports.rank_memory import (
    MAX_MESSAGE_BYTES,
    Served,
    ShardServer,
    Wire,
    fetch,
)
from rlhf_cluster.weights.transports.transport import Deadline

LARGE = [os.urandom(3 << 14), b"", os.urandom((2 << 14) + 17)]
GENEROUS_S = 60.0


class Rank:
    """A server and what it was told."""

    def __init__(self, **options: Any) -> None:
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.server = ShardServer("learner-0", "127.0.0.1", GENEROUS_S, self.notes.put, **options)

    def lend(self, *chunks: bytes) -> Served:
        return self.server.lend([memoryview(chunk) for chunk in chunks])

    def note(self) -> str:
        return self.notes.get(timeout=GENEROUS_S)

    def ask(self, handle: Served, **changes: object) -> Wire:
        """A reader that has asked, and that the test goes on for."""
        wire = Wire(socket.create_connection((handle.host, handle.port)), "the rank")
        asked = {"reader": "r", "token": handle.token, "key": handle.key}
        wire.tell(soon(), **(asked | {"timeout_s": GENEROUS_S} | changes))
        return wire


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.server.close()


def soon() -> Deadline:
    return Deadline("the test", GENEROUS_S)


def fetched(handle: Served, deadline: Deadline | None = None) -> bytes:
    found = bytearray()
    fetch(handle, "generation-0", deadline or soon(), found.extend)
    return bytes(found)


def test_an_object_comes_whole_in_pieces_of_bounded_size(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_memory, "_CHUNK_BYTES", 1000)
    sizes: list[int] = []
    found = bytearray()

    def write(piece: memoryview) -> None:
        sizes.append(len(piece))
        found.extend(piece)

    fetch(rank.lend(*LARGE), "generation-0", soon(), write)
    assert bytes(found) == b"".join(LARGE)
    assert max(sizes) == 1000
    assert fetched(rank.lend(b"")) == b""


def test_without_the_token_nothing_is_given_and_the_rank_is_told(rank: Rank) -> None:
    handle = rank.lend(b"secret")
    assert handle.token not in repr(handle)
    with pytest.raises(WeightError, match="asks without this process's token"):
        fetched(dataclasses.replace(handle, token="guess"))
    assert "without this process's token" in rank.note()


@pytest.mark.parametrize(
    "words",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        (MAX_MESSAGE_BYTES + 1).to_bytes(4, "big"),
        b"\0\0\0\2{]",
        b"\0\0\0\2[]",
        b"\0\0\0\2{}",
    ],
)
def test_whoever_speaks_something_else_is_turned_away_and_readers_are_served(
    rank: Rank, words: bytes
) -> None:
    handle = rank.lend(b"abc")
    with socket.create_connection((handle.host, handle.port)) as stranger:
        stranger.sendall(words)
        assert "did not get its shard" in rank.note()
    assert fetched(handle) == b"abc"


def test_what_is_gone_is_named_and_so_is_a_rank_that_is(rank: Rank) -> None:
    kept, lost = rank.lend(b"abc"), rank.lend(b"abc")
    rank.server.drop([lost.key])
    with pytest.raises(WeightError, match=f"learner-0 at .*object {lost.key} is lost: learner-0"):
        fetched(lost)
    rank.server.close()
    with pytest.raises(WeightError, match=f"object {kept.key} is lost: learner-0 at .*cannot be r"):
        fetched(kept)


def test_an_object_that_is_dropped_while_a_reader_takes_it_comes_whole(
    rank: Rank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rank_memory, "_CHUNK_BYTES", 1000)
    handle, found = rank.lend(*LARGE), bytearray()

    def write(piece: memoryview) -> None:
        rank.server.drop([handle.key])
        found.extend(piece)

    fetch(handle, "generation-0", soon(), write)
    assert bytes(found) == b"".join(LARGE)
    assert not rank.server.held


def test_a_reader_that_never_says_thanks_costs_one_deadline_and_nobody_else_waits(
    rank: Rank,
) -> None:
    handle = rank.lend(*LARGE)
    with closing(rank.ask(handle, timeout_s=0.3)) as absent:
        assert fetched(handle) == b"".join(LARGE)
        assert "for r at 127.0.0.1:" in (note := rank.note())
        assert "was not over after 0.3 s" in note
        assert absent.hear(soon(), "the size") == {"num_bytes": sum(map(len, LARGE))}


def test_a_reader_that_leaves_in_the_middle_is_noticed_at_once(rank: Rank) -> None:
    wire = rank.ask(rank.lend(*LARGE))
    wire.hear(soon(), "the size")
    wire.close()
    assert "is disconnected" in rank.note()


def test_a_reader_that_cannot_keep_what_comes_ends_the_transfer_and_says_why(rank: Rank) -> None:
    handle = rank.lend(*LARGE)

    def full(piece: memoryview) -> None:
        raise OSError(errno.ENOSPC, "no room here")

    with pytest.raises(OSError, match="no room here"):
        fetch(handle, "generation-0", soon(), full)
    assert "no room here" in rank.note() or "is disconnected" in rank.note()
    assert fetched(handle) == b"".join(LARGE)


def test_a_cancelled_reader_ends_in_the_middle(rank: Rank, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_memory, "_CHUNK_BYTES", 1000)
    handle, deadline = rank.lend(*LARGE), Deadline("pull of version 7", GENEROUS_S)
    with pytest.raises(WeightError, match="pull of version 7 was cancelled, waiting for object"):
        fetch(handle, "generation-0", deadline, lambda piece: deadline.cancel())
    assert fetched(handle) == b"".join(LARGE)


def test_a_reader_past_its_deadline_asks_nobody(rank: Rank) -> None:
    now = [0.0]
    deadline = Deadline("pull of version 7", 5.0, lambda: now[0])
    now[0] = 6.0
    with pytest.raises(StalledError, match="waiting for learner-0 at"):
        fetched(rank.lend(b"a"), deadline)


def test_a_rank_that_dies_in_the_middle_fails_the_reader_with_its_name() -> None:
    """The test is the rank: it says how much comes, and leaves."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()[:2]
        handle = Served(server="learner-1", host=host, port=port, key=1, token="t")
        failures: list[str] = []

        def read() -> None:
            try:
                fetched(handle)
            except WeightError as error:
                failures.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        with closing(Wire(listener.accept()[0], "the reader")) as wire:
            assert wire.hear(soon(), "a request")["timeout_s"] > 0
            wire.tell(soon(), num_bytes=9)
            wire.send(memoryview(b"abc"), soon())
        reader.join(GENEROUS_S)
    assert len(failures) == 1
    assert "learner-1 at 127.0.0.1" in failures[0]


def test_d15_strangers_that_say_nothing_get_no_more_threads_than_are_allowed() -> None:
    rank = Rank(max_connections=2)
    handle = rank.lend(b"weights")
    before = threading.active_count()
    try:
        strangers = [socket.create_connection((handle.host, handle.port)) for _ in range(40)]
        reader = threading.Thread(target=lambda: found.append(fetched(handle)))
        found: list[bytes] = []
        reader.start()
        assert threading.active_count() <= before + 3, "two strangers and the reader here"
        for stranger in strangers:
            stranger.close()
        reader.join(GENEROUS_S)
        assert found == [b"weights"]
    finally:
        rank.server.close()


class Failing:
    """A listener whose next connections fail: at `accept`, or at the first use of what it gives."""

    def __init__(self, at_accept: int = 0, at_use: int = 0) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._at_accept, self._at_use = at_accept, at_use
        self.let_go = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._listener, name)

    def accept(self) -> tuple[Any, Any]:
        if self._at_accept:
            self._at_accept -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        connection, address = self._listener.accept()
        if self._at_use:
            self._at_use -= 1
            connection.close()  # what is set on it fails from here on
            self.let_go += 1
        return connection, address


@pytest.mark.parametrize("failing", [{"at_accept": 3}, {"at_use": 3}])
def test_n11_a_server_without_file_descriptors_pauses_and_serves_on(
    failing: dict[str, int],
) -> None:
    pauses: queue.SimpleQueue[int] = queue.SimpleQueue()
    rank = Rank(listener=Failing(**failing), max_connections=1, pause=lambda closed: pauses.put(1))
    try:
        handle = rank.lend(b"weights")
        if "at_use" in failing:  # each of these is let in, and lost
            for _ in range(3):
                with socket.create_connection((handle.host, handle.port)) as lost:
                    assert "was not let in" in rank.note()
                    lost.close()
        assert fetched(handle) == b"weights", "its one slot is free again"
        assert pauses.qsize() == 3
    finally:
        rank.server.close()


def test_n11_a_server_that_is_closed_while_it_pauses_ends() -> None:
    paused = threading.Event()

    def pause(closed: threading.Event) -> None:
        paused.set()
        assert closed.wait(GENEROUS_S)

    rank = Rank(listener=Failing(at_accept=1 << 30), pause=pause)
    assert paused.wait(GENEROUS_S)
    rank.server.close()
    for thread in threading.enumerate():
        if thread.name == "learner-0-shards":
            thread.join(GENEROUS_S)
            assert not thread.is_alive()
