"""How one object's bytes get from the process that holds them to one that reads them.

    wire   a socket between the two: questions, answers and errors, each a small JSON message, and
           the bytes of small objects
    pair   a process group of the two alone, made for one object: buckets of bounded size, of which
           two are under way, through gloo between hosts' memory or NCCL between GPUs

Promises:
- all waits end with the deadline, its cancel, the death of the other process or its error, whose
  text is what is raised here;
- a pair has two members, so that a process that dies, hangs or joins concerns no other's transfer,
  and it is never used again, so that nothing has to be mended after a failure;
- bytes are received into memory of their own: what they are for is not touched before they are whole.

A call into a process group can hang. Each runs in a thread of its own (`carry`), which whoever waits
can leave: the group is aborted then, and the thread ends at the latest with the group's own timeout.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import select
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.transport import (
    Blob,
    Deadline,
)

BACKENDS = ("gloo", "nccl")
MAX_MESSAGE_BYTES = 1 << 16
MAX_TEXT_CHARACTERS = 4000
POLL_S = 0.2
"""How soon a wait ends after its deadline was cancelled, or the other process spoke."""
LAST_WORDS_S = 2.0
"""How long a failed transfer waits for the other side's reason."""
NCCL_GRACE_S = 120.0
"""NCCL's own timeout, which ends the process, comes so long after the deadline, which does not."""


class Wire:
    """One end of a socket. `peer` is what errors call the other."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._socket, self.peer = connection, peer
        connection.settimeout(POLL_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def tell(self, deadline: Deadline, **message: Any) -> None:
        """Raises `WeightError` when nobody is there to hear it, `StalledError`."""
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise WeightError(f"a message of {len(data)} bytes is over {MAX_MESSAGE_BYTES}")
        self.send(memoryview(len(data).to_bytes(4, "big") + data), deadline)

    def hear(self, deadline: Deadline, waits_for: str) -> dict[str, Any]:
        """The next message. Raises `WeightError` with the text of an error, or when the other process
        is gone or talks something else; `StalledError`."""
        head = bytearray(4)
        self.receive(memoryview(head), deadline, waits_for)
        size = int.from_bytes(head, "big")
        if size > MAX_MESSAGE_BYTES:
            raise WeightError(f"{self.peer} does not speak this protocol")
        data = bytearray(size)
        self.receive(memoryview(data), deadline, waits_for)
        try:
            message = json.loads(data)
        except ValueError as error:
            raise WeightError(f"{self.peer} does not speak this protocol ({error})") from error
        if not isinstance(message, dict):
            raise WeightError(f"{self.peer} does not speak this protocol")
        if "error" in message:
            raise WeightError(f"{self.peer}: {message['error']}")
        return message

    def tell_error(self, error: BaseException) -> None:
        """Say why this side gives up, if there is still somebody to hear it."""
        with contextlib.suppress(WeightError, TimeoutError):
            text = f"{type(error).__name__}: {error}"[:MAX_TEXT_CHARACTERS]
            self.tell(Deadline("an error's text", LAST_WORDS_S), error=text)

    def speaks(self, within_s: float = 0.0) -> bool:
        """Whether there is something to hear, the end of the connection included."""
        return bool(select.select([self._socket], [], [], within_s)[0])

    def send(self, data: memoryview, deadline: Deadline) -> None:
        while data:
            deadline.left_s(f"{self.peer} to take {len(data)} bytes")
            try:
                data = data[self._socket.send(data) :]
            except TimeoutError:
                continue
            except OSError as error:
                raise WeightError(f"{self.peer} is gone ({error})") from error

    def receive(self, target: memoryview, deadline: Deadline, waits_for: str) -> None:
        while target:
            deadline.left_s(waits_for)
            try:
                size = self._socket.recv_into(target)
            except TimeoutError:
                continue
            except OSError as error:
                raise WeightError(f"{self.peer} is gone ({error})") from error
            if size == 0:
                raise WeightError(f"{self.peer} is gone: it closed the connection")
            target = target[size:]

    def close(self) -> None:
        self._socket.close()


def carry(
    move: Callable[[], None], wire: Wire, deadline: Deadline, what: str
) -> dict[str, Any] | None:
    """Run `move`, which may hang, in a thread of its own, beside `wire`.

    Returns None when it is done, or what the other side said before. Unblocked by: the end of `move`,
    the other side's words or end, the deadline, its cancel. Raises `WeightError` with the other side's
    text, or why `move` failed; `StalledError`.
    """
    done, failures = threading.Event(), list[Exception]()

    def run() -> None:
        try:
            move()
        except Exception as error:
            failures.append(error)
        finally:
            done.set()

    threading.Thread(target=run, name="weights-pair", daemon=True).start()
    while not done.wait(POLL_S):
        deadline.left_s(what)
        if wire.speaks():
            return wire.hear(deadline, what)
    if failures:
        if wire.speaks(LAST_WORDS_S):
            wire.hear(Deadline(what, LAST_WORDS_S), what)
        raise WeightError(f"{what}: {_first_line(failures[0])}") from failures[0]
    return None


class Pair:
    """One side of a process group of two. The sender is `rank` 0, and serves the store they meet at.

    `close` it when both sides are done, or when this one gives up: what is under way then ends, here
    and so on the other side.
    """

    def __init__(
        self, backend: str, rank: int, store: Callable[[], Any], bucket_bytes: int, timeout_s: float
    ) -> None:
        """`store` opens the meeting place; `timeout_s` bounds each of the group's operations."""
        self._backend, self._rank, self._store = backend, rank, store
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._lock = threading.Lock()
        self._group: Any = None
        self._closed = False

    def send(self, blob: Blob) -> None:
        """Every byte of `blob`, in order. Blocks; see `carry`."""
        with _own_stream(self._backend):
            group = self._join()
            buckets = _Bucket.two(self._backend, min(self._bucket_bytes, blob.num_bytes))
            for index, (start, size) in enumerate(_cut(blob.num_bytes, self._bucket_bytes)):
                bucket = buckets[index % 2]
                bucket.wait()
                blob.read_into(bucket.host[:size], start)
                bucket.begin(group, size, sends=True)
            for bucket in buckets:
                bucket.wait()

    def receive(self, target: memoryview, received: Callable[[int], None]) -> None:
        """Fill `target` with what the other side sends; `received` is told how much is there. Blocks;
        see `carry`."""
        with _own_stream(self._backend):
            group = self._join()
            buckets = _Bucket.two(self._backend, min(self._bucket_bytes, len(target)))
            ranges = list(_cut(len(target), self._bucket_bytes))
            for index in range(len(ranges) + 1):
                if index < len(ranges):
                    buckets[index % 2].begin(group, ranges[index][1], sends=False)
                if index > 0:
                    start, size = ranges[index - 1]
                    bucket = buckets[(index - 1) % 2]
                    bucket.wait()
                    target[start : start + size] = bucket.host[:size]
                    received(start + size)

    def close(self) -> None:
        """Another thread than that of `send` or `receive` may call it."""
        with self._lock:
            self._closed, group, self._group = True, self._group, None
        if group is not None:
            group.abort()

    def _join(self) -> Any:
        group = _group_of_two(self._backend, self._store(), self._rank, self._timeout_s)
        with self._lock:
            closed, self._group = self._closed, group
        if closed:
            self.close()
            raise WeightError("the transfer was given up while its group formed")
        return group


class _Bucket:
    """A piece of host memory, and of the GPU's where the backend moves that."""

    def __init__(self, backend: str, num_bytes: int) -> None:
        import torch

        on_gpu = backend == "nccl"
        self._tensor = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._moved = self._tensor.to("cuda") if on_gpu else self._tensor
        self._on_gpu, self._work, self._received = on_gpu, None, 0
        self.host = self._tensor.numpy().data

    @classmethod
    def two(cls, backend: str, num_bytes: int) -> tuple[_Bucket, _Bucket]:
        return cls(backend, num_bytes), cls(backend, num_bytes)

    def begin(self, group: Any, size: int, sends: bool) -> None:
        if sends and self._on_gpu:
            self._moved[:size].copy_(self._tensor[:size], non_blocking=True)
        self._received = 0 if sends else size
        self._work: Any = group.broadcast(self._moved[:size], 0)

    def wait(self) -> None:
        """Waits for: the operation under way, if there is one. Its bytes are in `host` then."""
        work, self._work = self._work, None
        if work is None:
            return
        work.wait()
        if self._on_gpu:
            import torch

            size = self._received
            self._tensor[:size].copy_(self._moved[:size], non_blocking=True)
            torch.cuda.current_stream().synchronize()


def serve_meeting(host: str) -> Any:
    """A store for one pair, on a port of its own at `host`, served while the object lives."""
    from rlhf_cluster.util.process_group import serve_store

    return serve_store(socket.create_server((host, 0)))


def meet(host: str, port: int, timeout_s: float) -> Any:
    from rlhf_cluster.util.process_group import TCPStore

    timeout = datetime.timedelta(seconds=timeout_s)
    return TCPStore(host, port, None, False, timeout=timeout, wait_for_workers=False)


def usable(backend: str | None) -> bool:
    """Whether this process can be in a pair."""
    import torch
    import torch.distributed as dist

    if backend == "nccl":
        return torch.cuda.is_available() and dist.is_nccl_available()
    return backend == "gloo" and dist.is_gloo_available()


def _group_of_two(backend: str, store: Any, rank: int, timeout_s: float) -> Any:
    import torch.distributed as dist

    distributed: Any = dist
    if backend == "gloo":
        return distributed.ProcessGroupGloo(
            store, rank, 2, datetime.timedelta(seconds=max(timeout_s, 1.0))
        )
    # Past its own timeout torch's NCCL watchdog ends the process: a learner would die of a reader.
    options = distributed.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s + NCCL_GRACE_S)
    return distributed.ProcessGroupNCCL(store, rank, 2, options)


def _own_stream(backend: str) -> Any:
    if backend != "nccl":
        return contextlib.nullcontext()
    import torch

    return torch.cuda.stream(torch.cuda.Stream())


def _cut(num_bytes: int, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_bytes, bucket_bytes):
        yield start, min(bucket_bytes, num_bytes - start)


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
