"""Threads, clock and transfers of a mirror in a worker's process (`mirror_ports.Carrier`).

Promises:
- A read of the storage that hangs blocks one thread only. No caller waits for this thread past its
  limit, or at the end of the process. If the read continues after all, it writes nothing.
- While `MAX_HUNG` reads hang, no further one begins: a storage that never answers again costs at most
  this number of threads.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.mirror_ports import NoProgress
from rlhf_cluster.weights.transports.rank_memory import ShardServer, fetch
from rlhf_cluster.weights.transports.relay_plan import Piece
from rlhf_cluster.weights.transports.shared_files import gone, version_dir
from rlhf_cluster.weights.transports.transport import Deadline

MAX_HUNG = 32
_LOOK_S = 0.2  # between two checks of a deadline that another thread may cancel
_STOP_S = 0.5  # for threads to see that their caller does not wait any more
_CALL_BYTES = 16 << 20
_T = TypeVar("_T")


def finish(work: Coroutine[Any, Any, _T]) -> _T:
    """Run `work`, which never suspends, to its end in this thread, and return its result."""
    try:
        work.send(None)
    except StopIteration as ended:
        return ended.value
    work.close()
    raise AssertionError(
        "a mirror with this carrier waits in its thread, and never on an event loop"
    )


class ThreadCarrier:
    """Carrier with threads. `server` serves what this node lends; the storage is the folder `root`."""

    def __init__(
        self,
        root: str | Path,
        node: str,
        server: ShardServer,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.clock = clock
        self._root, self._node, self._server, self._sleep = Path(root), node, server, sleep
        self._reads: list[_Reading] = []

    def where(self, version: int) -> str:
        return str(version_dir(self._root, version))

    async def sleep(self, seconds: float) -> None:
        self._sleep(seconds)

    async def ask(self, call: Callable[..., _T], *arguments: Any) -> _T:
        return call(*arguments)

    def lock(self) -> _ThreadLock:
        return _ThreadLock()

    async def all_of(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        count: int,
        deadline: Deadline,
        waits_for: str,
        end: Callable[[], None],
    ) -> None:
        ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

        def run() -> None:
            error: BaseException | None = None
            try:
                finish(work())
            except BaseException as raised:  # raised again in the thread that waits
                error = raised
            ended.put(error)

        name = f"{self._node}-mirror"
        threads = [threading.Thread(target=run, name=name, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                error = _next(ended, lambda: deadline.left_s(waits_for))
                if error is not None:
                    raise error
        finally:
            end()
            grace = time.monotonic() + _STOP_S
            for thread in threads:
                thread.join(max(0.0, grace - time.monotonic()))

    async def from_storage(
        self, piece: Piece, part: Any, progress_s: float, left_s: Callable[[], float]
    ) -> None:
        path = version_dir(self._root, piece.version) / piece.name
        self._reads = [read for read in self._reads if read.is_alive]
        if len([read for read in self._reads if read.is_over]) >= MAX_HUNG:
            raise WeightError(
                f"{path}: is not read, since {MAX_HUNG} reads of that storage hang. Look at its mount "
                "on this node"
            )
        read = _Reading(path, f"{self._node}-mirror-read")
        self._reads.append(read)
        try:
            while chunk := read.next_chunk(progress_s, left_s, self.clock):
                part.write(chunk)
        finally:
            read.is_over = True

    async def from_node(self, address: Any, part: Any, lease: Deadline) -> None:
        fetch(address, self._node, lease, part.write)

    def lend(self, data: memoryview) -> Any:
        return self._server.lend([data])

    def drop(self, keys: Sequence[int]) -> None:
        self._server.drop(keys)

    def close(self) -> None:
        self._server.close()


class _ThreadLock(contextlib.AbstractAsyncContextManager[None]):
    def __init__(self) -> None:
        self._lock = threading.Lock()

    async def __aenter__(self) -> None:
        self._lock.acquire()

    async def __aexit__(self, *raised: object) -> None:
        self._lock.release()


class _Reading:
    """A file of the storage, read by a dedicated thread, at most two chunks ahead."""

    def __init__(self, path: Path, name: str) -> None:
        self.is_over = False
        """Whether the caller does not want the file any more; the thread then ends."""
        self._path = path
        self._chunks: queue.Queue[bytes | WeightError] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._read, name=name, daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def next_chunk(
        self, progress_s: float, left_s: Callable[[], float], clock: Callable[[], float]
    ) -> bytes:
        """Return the next chunk, empty at the end of the file.

        Waits for: the storage. Raises `NoProgress` after `progress_s` without a chunk; `WeightError`;
        what `left_s` raises.
        """
        ends = clock() + progress_s

        def still_s() -> float:
            left = min(left_s(), ends - clock())
            if left <= 0:
                raise NoProgress(
                    f"{self._path}: nothing was read for {progress_s:g} s. Look at that storage, and "
                    "at its mount on this node"
                )
            return left

        chunk = _next(self._chunks, still_s)
        if isinstance(chunk, WeightError):
            raise chunk
        return chunk

    def _read(self) -> None:
        try:
            with self._path.open("rb", buffering=0) as stored:
                while self._put(chunk := stored.read(_CALL_BYTES)) and chunk:
                    pass
        except FileNotFoundError:
            self._put(WeightError(gone(str(self._path.parent))))
        except OSError as error:
            self._put(WeightError(f"{self._path}: cannot be read ({error})"))

    def _put(self, chunk: bytes | WeightError) -> bool:
        """Queue a chunk for the caller. Return whether the caller still wants more."""
        while not self.is_over:
            with contextlib.suppress(queue.Full):
                self._chunks.put(chunk, timeout=_LOOK_S)
                return True
        return False


def _next(ended: queue.Queue[_T] | queue.SimpleQueue[_T], left_s: Callable[[], float]) -> _T:
    """Return the next item of the queue. Raises what `left_s` raises, at most `_LOOK_S` late."""
    while True:
        with contextlib.suppress(queue.Empty):
            return ended.get(timeout=min(_LOOK_S, left_s()))
