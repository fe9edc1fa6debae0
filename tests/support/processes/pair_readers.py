"""Readers of a rank's memory as processes of their own, which fail where a test wants them to.

`check_transfers` is the same for gloo between processes and for NCCL between GPUs.
"""

from __future__ import annotations

import hashlib
import multiprocessing as mp
import os
import queue
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from rlhf_cluster.weights.transports.rank_memory import (
    PeerObjects,
    Served,
    ShardServer,
)
from rlhf_cluster.weights.transports.transport import Deadline

GENEROUS_S = 180.0
BUCKET = 1 << 20
NUM_BYTES = 6 * BUCKET + 11


class Reader:
    """One process. `ask` it to fetch, then wait for its `answer`: (kind, what)."""

    def __init__(self, name: str, backend: str, gpu: int | None) -> None:
        context = mp.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_read, args=(theirs, name, backend, gpu), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, handles: Sequence[Served], mode: str = "", timeout_s: float = GENEROUS_S) -> None:
        self._pipe.send((list(handles), mode, timeout_s))

    def answer(self) -> tuple[str, str]:
        assert self._pipe.poll(GENEROUS_S), "no answer"
        return self._pipe.recv()

    def go_on(self) -> None:
        self._pipe.send("go on")


def _read(pipe: Any, name: str, backend: str, gpu: int | None) -> None:
    signal.alarm(600)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    while True:
        try:
            handles, mode, timeout_s = pipe.recv()
        except EOFError:
            return

        def received(num_bytes: int, mode: str = mode) -> None:
            if num_bytes != 3 * BUCKET or not mode:
                return
            if mode == "raise":
                raise ValueError("scripted failure")
            if mode == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if mode == "hang":
                threading.Event().wait()
            if mode == "wait":
                pipe.send(("waits", ""))
                assert pipe.recv() == "go on"

        try:
            reader = PeerObjects(name, backend, received=received)
            found = reader.fetch(handles, Deadline("the pull", timeout_s))
            pipe.send(("read", " ".join(_hash(chunks) for chunks in found)))
        except Exception as error:
            pipe.send((type(error).__name__, str(error)))


class Rank:
    """A learner rank's server, in this process."""

    def __init__(self, number: int) -> None:
        self.notes: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.server = ShardServer(
            f"learner-{number}", "127.0.0.1", GENEROUS_S, bucket_bytes=BUCKET, told=self.notes.put
        )
        self._number = number

    def write(self, version: int, listed: Sequence[int]) -> tuple[Served, str]:
        """The shard of `version`, and its hash."""
        data = bytes([version, self._number]) * (NUM_BYTES // 2) + b"!"
        shelf = self.server.shelf()
        handle = shelf.put([data[:1000], data[1000:]])
        self.server.keep(version, shelf, listed)
        return handle, _hash([data])

    def told(self, *words: str) -> None:
        """Waits for: as many notes, which have these words between them."""
        notes = [self.notes.get(timeout=GENEROUS_S) for _ in words]
        for word in words:
            assert any(word in note for note in notes), (word, notes)


def _hash(chunks: Sequence[Any]) -> str:
    found = hashlib.sha256()
    for chunk in chunks:
        found.update(chunk)
    return found.hexdigest()


@contextmanager
def two_ranks() -> Iterator[list[Rank]]:
    with ExitStack() as stack:
        ranks = [Rank(0), Rank(1)]
        for rank in ranks:
            stack.callback(rank.server.close)
        yield ranks


@contextmanager
def readers(backend: str, gpus: Sequence[int | None]) -> Iterator[list[Reader]]:
    started = [Reader(f"generation-{i}", backend, gpu) for i, gpu in enumerate(gpus)]
    try:
        yield started
    finally:
        for reader in started:
            reader.process.kill()
            reader.process.join(GENEROUS_S)


def check_transfers(backend: str, gpus: Sequence[int | None] = (None, None, None)) -> None:
    """Three readers take from two ranks; one raises, one dies and one hangs in the middle; publishes
    race a reader. Whoever is left reads the next version, in the same process."""
    with two_ranks() as ranks, readers(backend, gpus) as (first, second, third):
        versions: list[list[Served]] = []
        hashes: list[str] = []

        def publish(version: int, listed: Sequence[int]) -> None:
            written = [rank.write(version, listed) for rank in ranks]
            versions.append([handle for handle, _ in written])
            hashes.append(" ".join(found for _, found in written))

        publish(0, [])
        for reader in (first, second, third):
            reader.ask(versions[0])
        for reader in (first, second, third):
            assert reader.answer() == ("read", hashes[0])

        publish(1, [0])
        one_rank = versions[1][:1]
        first.ask(one_rank, "raise")
        second.ask(one_rank, "die")
        third.ask(versions[1])
        kind, text = first.answer()
        assert kind == "WeightError"
        assert "scripted failure" in text
        assert third.answer() == ("read", hashes[1])
        ranks[0].told("ValueError: scripted failure", "generation-1 at")
        second.process.join(GENEROUS_S)
        assert second.process.exitcode == -signal.SIGKILL

        first.ask(one_rank, "hang", timeout_s=3.0)
        kind, text = first.answer()
        assert (kind, "was not over after 3 s" in text) == ("StalledError", True)
        ranks[0].told("was not over after")

        # Version 1 is taken while 2 and 3 are published and it is let go of.
        first.ask(one_rank, "wait")
        assert first.answer() == ("waits", "")
        publish(2, [0, 1])
        publish(3, [2])
        assert ranks[0].server.versions() == [2, 3]
        third.ask(versions[3])
        assert third.answer() == ("read", hashes[3])
        first.go_on()
        assert first.answer() == ("read", hashes[1].split()[0])
        first.ask(versions[1])
        kind, text = first.answer()
        assert (kind, "is lost" in text) == ("WeightError", True)
        first.ask(versions[3])
        assert first.answer() == ("read", hashes[3])
