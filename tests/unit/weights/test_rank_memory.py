"""Shards in a rank's memory, and how readers get them: over sockets and through gloo."""

import contextlib
import dataclasses
import os
import queue
import socket
import threading
from collections.abc import Iterator

import pytest

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.weights.transports.point_to_point import (
    MAX_MESSAGE_BYTES,
    Wire,
    serve_meeting,
)
from rlhf_cluster.weights.transports.rank_memory import (
    PeerObjects,
    Served,
    ShardServer,
)
from rlhf_cluster.weights.transports.transport import Deadline

BUCKET = 1 << 14
LARGE = [os.urandom(3 * BUCKET), os.urandom(2 * BUCKET + 17)]
GENEROUS_S = 60.0


class Rank:
    """A server and what it was told."""

    def __init__(self) -> None:
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.server = ShardServer(
            "learner-0", "127.0.0.1", GENEROUS_S, BUCKET, BUCKET // 2, self.notes.put
        )
        self.shelf = self.server.shelf()

    def note(self) -> str:
        return self.notes.get(timeout=GENEROUS_S)

    def ask(self, handle: Served, **changes: object) -> Wire:
        """A reader that has asked, and that the test goes on for."""
        wire = Wire(socket.create_connection((handle.host, handle.port)), "the rank")
        asked = {"reader": "r", "token": handle.token, "key": handle.key, "backend": "gloo"}
        wire.tell(soon(), **(asked | {"timeout_s": GENEROUS_S} | changes))
        return wire


@pytest.fixture
def rank() -> Iterator[Rank]:
    rank = Rank()
    yield rank
    rank.server.close()


def soon() -> Deadline:
    return Deadline("the test", GENEROUS_S)


def fetched(handles: list[Served], backend: str | None = "gloo") -> list[list[bytes]]:
    found = PeerObjects("generation-0", backend).fetch(handles, soon())
    return [[bytes(chunk) for chunk in chunks] for chunks in found]


def test_large_objects_come_in_buckets_and_small_ones_over_the_socket(rank: Rank) -> None:
    large, small = rank.shelf.put(LARGE), rank.shelf.put([b"abc", b"", b"de"])
    sizes: list[int] = []
    reader = PeerObjects("generation-0", "gloo", received=sizes.append)
    found = reader.fetch([large, small], soon())
    assert [[bytes(chunk) for chunk in chunks] for chunks in found] == [LARGE, [b"abc", b"", b"de"]]
    assert sizes == [BUCKET * n for n in range(1, 6)] + [5 * BUCKET + 17]
    assert fetched([large], backend=None) == [LARGE]


def test_a_process_reads_what_it_serves_itself_without_a_wire(rank: Rank) -> None:
    handle = rank.shelf.put(LARGE)
    other = Rank()
    elsewhere = other.shelf.put([b"x"])
    reader = PeerObjects("learner-0", "gloo", own=lambda: rank.server)
    rank.server.close()
    found = reader.fetch([handle, elsewhere], soon())
    assert [[bytes(chunk) for chunk in chunks] for chunks in found] == [LARGE, [b"x"]]
    other.server.close()


def test_without_the_token_nothing_is_given_and_the_rank_is_told(rank: Rank) -> None:
    handle = rank.shelf.put([b"secret"])
    assert handle.token not in repr(handle)
    with pytest.raises(WeightError, match="asks without this process's token"):
        fetched([dataclasses.replace(handle, token="guess")])
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
    handle = rank.shelf.put([b"abc"])
    with socket.create_connection((handle.host, handle.port)) as stranger:
        stranger.sendall(words)
        assert "did not get its shard" in rank.note()
    assert fetched([handle]) == [[b"abc"]]


def test_what_is_gone_is_named_and_so_is_a_rank_that_is(rank: Rank) -> None:
    kept, lost = rank.shelf.put([b"abc"]), rank.shelf.put([b"abc"])
    rank.server.drop([lost.key])
    with pytest.raises(WeightError, match=f"learner-0 at .*object {lost.key} is lost: learner-0"):
        fetched([kept, lost])
    rank.server.close()
    with pytest.raises(WeightError, match=f"object {kept.key} is lost: learner-0 at .*cannot be r"):
        fetched([kept])


def test_a_rank_keeps_what_the_directory_lists_and_what_came_since(rank: Rank) -> None:
    def write(version: int, listed: list[int]) -> Served:
        shelf = rank.server.shelf()
        handle = shelf.put([b"%d" % version])
        rank.server.keep(version, shelf, listed)
        return handle

    handles = {version: write(version, []) for version in (0, 1)}
    handles[2] = write(2, [0, 1])
    handles[3] = write(3, [0, 2])  # 1 is neither kept nor built on
    assert rank.server.versions() == [0, 2, 3]
    with pytest.raises(WeightError, match="is lost"):
        fetched([handles[1]])
    # The same version again: readers find the first until the commit, so it stays until then.
    again = write(3, [0, 2, 3])
    assert fetched([handles[3], again]) == [[b"3"], [b"3"]]
    write(4, [2, 3])
    with pytest.raises(WeightError, match="is lost"):
        fetched([handles[3]])
    assert fetched([again, handles[2]]) == [[b"3"], [b"2"]]


def test_an_object_that_is_let_go_of_while_a_reader_takes_it_comes_whole(rank: Rank) -> None:
    handle = rank.shelf.put(LARGE)
    dropped: list[int] = []

    def drop(num_bytes: int) -> None:
        if not dropped:
            dropped.append(handle.key)
            rank.server.drop(dropped)

    found = PeerObjects("generation-0", "gloo", received=drop).fetch([handle], soon())
    assert [bytes(chunk) for chunk in found[0]] == LARGE
    assert dropped == [handle.key]


def test_a_reader_that_never_joins_costs_one_deadline_and_nobody_else_waits(rank: Rank) -> None:
    handle = rank.shelf.put(LARGE)
    with contextlib.closing(rank.ask(handle, timeout_s=0.3)) as absent:
        assert absent.hear(soon(), "an offer")["backend"] == "gloo"
        assert fetched([handle]) == [LARGE]
        assert "for r at 127.0.0.1:" in (note := rank.note())
        assert "was not over after 0.3 s" in note
        with pytest.raises(WeightError, match=r"StalledError.*was not over after 0.3 s"):
            absent.hear(soon(), "the rank's words")


def test_a_reader_that_leaves_instead_of_joining_is_noticed_at_once(rank: Rank) -> None:
    wire = rank.ask(rank.shelf.put(LARGE))
    wire.hear(soon(), "an offer")
    wire.close()
    assert "is gone: it closed the connection" in rank.note()


def test_a_cancelled_reader_ends_in_the_middle_and_its_words_reach_the_rank(rank: Rank) -> None:
    handle = rank.shelf.put(LARGE)
    deadline, ends = Deadline("pull of version 7", GENEROUS_S), threading.Event()

    def hang(num_bytes: int) -> None:
        if num_bytes > 2 * BUCKET:
            deadline.cancel()
            ends.wait(GENEROUS_S)

    with pytest.raises(WeightError, match="pull of version 7 was cancelled, waiting for object"):
        PeerObjects("generation-0", "gloo", received=hang).fetch([handle], deadline)
    ends.set()
    assert "generation-0 at" in (note := rank.note())
    assert "pull of version 7 was cancelled" in note
    assert fetched([handle]) == [LARGE]


def test_a_reader_past_its_deadline_asks_nobody(rank: Rank) -> None:
    now = [0.0]
    deadline = Deadline("pull of version 7", 5.0, lambda: now[0])
    now[0] = 6.0
    with pytest.raises(StalledError, match="waiting for learner-0 at"):
        PeerObjects("generation-0", "gloo").fetch([rank.shelf.put([b"a"])], deadline)


def test_a_rank_that_dies_in_the_middle_fails_the_reader_with_its_name() -> None:
    """The test is the rank: it offers a group, and leaves when the reader has come."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()[:2]
        handle = Served(server="learner-1", host=host, port=port, key=1, sizes=(9,), token="t")
        failures: list[str] = []

        def read() -> None:
            try:
                fetched([handle])
            except WeightError as error:
                failures.append(str(error))

        reader = threading.Thread(target=read)
        reader.start()
        wire = Wire(listener.accept()[0], "the reader")
        assert wire.hear(soon(), "a request")["timeout_s"] > 0
        store = serve_meeting(host)
        offer = {"num_bytes": 9, "backend": "gloo", "port": store.port, "bucket_bytes": 4}
        wire.tell(soon(), **offer)
        del store
        wire.close()
        reader.join(GENEROUS_S)
    assert len(failures) == 1
    assert "learner-1 at 127.0.0.1" in failures[0]


def test_d15_strangers_that_say_nothing_get_no_more_threads_than_are_allowed() -> None:
    server = ShardServer("learner-1", "127.0.0.1", GENEROUS_S, max_connections=2)
    handle = server.lend([memoryview(b"weights")])
    before = threading.active_count()
    try:
        strangers = [socket.create_connection((handle.host, handle.port)) for _ in range(40)]
        reader = threading.Thread(target=lambda: found.extend(fetched([handle], None)))
        found: list[list[bytes]] = []
        reader.start()
        assert threading.active_count() <= before + 3, "two strangers and the reader here"
        for stranger in strangers:
            stranger.close()
        reader.join(GENEROUS_S)
        assert found == [[b"weights"]]
    finally:
        server.close()
