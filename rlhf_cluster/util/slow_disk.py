"""File operations with a deadline, each in a separate thread.

A system call that waits for a disk cannot be cancelled. So it runs in a daemon thread, which ends with
the process at the latest, and the caller waits for the thread with a deadline.

Promises:
- a write that has taken `told_fraction` of its deadline is logged once as slow, with its path and its
  deadline. `DiskDeadline.wait` also logs when it has finished after all;
- no caller waits longer than the deadline, whatever the disk does, and neither does the process when
  it exits;
- an operation whose caller has stopped waiting (an abandoned operation) makes nothing visible. Code
  that is about to make something visible, such as a rename, calls `check_not_abandoned` first, which
  raises in an abandoned operation.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rlhf_cluster.errors import StalledError

log = logging.getLogger(__name__)

T = TypeVar("T")

GRACE_S = 0.5
"""Seconds that a caller of `BackgroundWriter.put` waits for its write, enough for a disk that is not
slow."""
MAX_QUEUED_WRITES = 10_000
"""Bound on the writes of a `BackgroundWriter` that wait behind the running one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskDeadline:
    """Deadline of a file operation, with the texts that report it.

    `setting` is the configuration key of `limit_s`, for the messages. `tell` logs a message.
    """

    limit_s: float
    setting: str
    told_fraction: float = 0.25
    tell: Callable[[str], None] = log.warning

    @property
    def slow_s(self) -> float:
        """Seconds after which an operation is logged as slow."""
        return self.limit_s * self.told_fraction

    def slow(self, what: str) -> str:
        """Return the warning for an operation that is slow."""
        return (
            f"slow disk: {what} is not written after {self.slow_s:g} s, and has "
            f"{self.setting} = {self.limit_s:g} s"
        )

    def over(self, what: str) -> str:
        """Return the error message for an operation that passed its deadline."""
        return (
            f"{what} was not written within {self.setting} = {self.limit_s:g} s: the disk is slow, or "
            "does not answer"
        )

    def wait(self, what: str, write: Callable[[], T]) -> T:
        """Run `write` in a thread, and return or raise what it does. `what` names it and its path.

        Waits for: the end of `write`. Unblocked by: that, or `StalledError` at the deadline.
        """
        job = _Job(write)
        threading.Thread(target=job.run, name="disk", daemon=True).start()
        if not job.done.wait(self.slow_s):
            self.tell(self.slow(what))
            if not job.done.wait(self.limit_s - self.slow_s):
                job.given_up = True
                raise StalledError(self.over(what))
            self.tell(f"slow disk: {what} was written after all")
        return job.result()

    async def aside(self, what: str, call: Callable[..., T], *arguments: Any) -> T:
        """Run the function `run_in_thread` with this deadline; a passed deadline raises
        `StalledError`."""
        ends = asyncio.timeout(self.limit_s)
        try:
            async with ends, self.telling(what):
                return await run_in_thread(call, *arguments)
        except TimeoutError:
            if not ends.expired():
                raise  # an error of the call itself
            raise StalledError(f"{self.over(what)}. Give it a faster disk, or raise that") from None

    @asynccontextmanager
    async def telling(self, what: str) -> AsyncIterator[None]:
        """Log the block once if it is slow. The caller sets the deadline."""
        timer = asyncio.get_running_loop().call_later(
            self.slow_s, lambda: self.tell(self.slow(what))
        )
        try:
            yield
        finally:
            timer.cancel()


def run_within(limit_s: float, what: str, call: Callable[[], T]) -> T:
    """Run `call` in a thread, and return or raise what it does.

    Waits for: the end of `call`. Unblocked by: that, or `StalledError` after `limit_s`. The thread is
    abandoned then, and makes nothing visible (`check_not_abandoned`).
    """
    job = _Job(call)
    threading.Thread(target=job.run, name="disk", daemon=True).start()
    if not job.done.wait(limit_s):
        job.given_up = True
        raise StalledError(f"{what} was not over after {limit_s:g} s: the storage does not answer")
    return job.result()


_jobs = threading.local()
"""Per thread: `running` lists the jobs that the thread is running, the outermost first."""


def check_not_abandoned(what: object) -> None:
    """Raise `StalledError` inside an abandoned operation, before it makes `what` visible."""
    if any(job.given_up for job in getattr(_jobs, "running", ())):
        raise StalledError(f"{what}: abandoned after its deadline; it stays invisible")


class _Job(Generic[T]):
    """One call with its result or error. `given_up`: its caller has stopped waiting."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call = contextvars.copy_context().run, call
        self.given_up = False
        self._returned: list[T] = []
        self._raised: BaseException | None = None
        self.done = threading.Event()

    def run(self) -> None:
        in_context, call = self._call
        _jobs.running = [*getattr(_jobs, "running", ()), self]
        try:
            self._returned.append(in_context(call))
        # Any error is raised again by `result`.
        except BaseException as error:
            self._raised = error
        finally:
            _jobs.running.remove(self)
            self.done.set()

    def result(self) -> T:
        if self._raised is not None:
            raise self._raised
        return self._returned[0]


async def run_in_thread(call: Callable[..., T], *arguments: Any) -> T:
    """Run `call` in a daemon thread, and return or raise what it does.

    Neither the event loop nor the process waits for the thread at its end, as they would with
    `asyncio.to_thread`.

    Waits for: the call, without a deadline. Cancelling abandons the thread, which then makes nothing
    visible (`check_not_abandoned`).
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    job = _Job(lambda: call(*arguments))

    def tell() -> None:
        if not ended.done():
            ended.set_result(None)

    def run() -> None:
        job.run()
        with suppress(RuntimeError):  # the loop is closed: no task waits any more
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name="disk", daemon=True).start()
    try:
        await ended
    except asyncio.CancelledError:
        job.given_up = True
        raise
    return job.result()


class LatestValue(Generic[T]):
    """Newest result of `look`, which asks a disk that may be slow. No caller waits for it."""

    def __init__(self, look: Callable[[], T], first: T) -> None:
        """Start the first call of `look`. Until it returns, `value` returns `first`."""
        self._look, self._found = look, first
        self._looking: threading.Thread | None = None
        self.value()

    def value(self) -> T:
        """Return the newest result, and start the next call of `look` unless one is running."""
        if self._looking is None or not self._looking.is_alive():
            self._looking = threading.Thread(target=self._again, name="disk", daemon=True)
            self._looking.start()
        return self._found

    def _again(self) -> None:
        self._found = self._look()


@dataclass(slots=True, eq=False)
class BackgroundWriter:
    """Queue of writes that one thread does in order. A slow disk does not hold up the caller.

    `put` waits up to `grace_s` for its own write, but not at all if an earlier write is still running.
    At most `MAX_QUEUED_WRITES` writes wait, each at most `patience.limit_s`. The error of a failed
    write is raised by the `put` or `flush` that waits for it, or by the next one, and the writes queued
    behind it are dropped.
    """

    what: str
    patience: DiskDeadline
    clock: Callable[[], float] = time.monotonic
    grace_s: float = GRACE_S
    _waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)
    _turn: threading.Condition = field(default_factory=threading.Condition)
    _error: BaseException | None = None
    _running: bool = False
    _told: bool = False

    def put(self, write: Callable[[], None], latest: bool = False) -> None:
        """Queue one write. `latest`: it replaces the queued writes that have not begun.

        Raises the error of a failed write, and `StalledError` if a write has passed its deadline or
        more than `MAX_QUEUED_WRITES` wait.
        """
        with self._turn:
            self._raise()
            late = self._running
            if latest and late:
                while len(self._waiting) > 1:
                    self._waiting.pop()
            self._waiting.append((self.clock(), write))
            if not late:
                self._running = True
                threading.Thread(target=self._work, name="disk", daemon=True).start()
                self._turn.wait_for(lambda: not self._running, self.grace_s)
            self._raise()

    def flush(self) -> None:
        """Wait until all queued writes are done. Raises what `put` raises.

        Waits for: the queued writes. Unblocked by: the last one, or `StalledError` at the deadline.
        """
        with self._turn:
            ended = self._turn.wait_for(lambda: not self._running, self.patience.limit_s)
            self._raise()
            if not ended:
                raise StalledError(self.patience.over(self.what))

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
        if not self._waiting:
            return
        waited_s = self.clock() - self._waiting[0][0]
        if waited_s >= self.patience.limit_s or len(self._waiting) > MAX_QUEUED_WRITES:
            raise StalledError(self.patience.over(self.what))
        if waited_s >= self.patience.slow_s and not self._told:
            self._told = True
            self.patience.tell(self.patience.slow(self.what))

    def _work(self) -> None:
        """Do the queued writes until none is left. A write stays in the queue until it is done."""
        while True:
            with self._turn:
                if not self._waiting:
                    self._running = self._told = False
                    self._turn.notify_all()
                    return
                _, write = self._waiting[0]
            job = _Job(write)
            job.run()
            with self._turn:
                self._waiting.popleft()
                try:
                    job.result()
                # `_raise` raises it in a later call of the caller.
                except BaseException as error:
                    self._error = error
                    self._waiting.clear()
