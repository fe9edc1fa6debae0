"""Writes that may take very long: told of after a while, given up at a deadline.

A system call that waits for a disk cannot be ended. So it runs in a thread of its own, which ends with
its process at the latest, and who waits for it waits here, with a deadline.

Promises:
- a write that has taken `told_fraction` of its deadline is told of, once, with what it is, where, and
  how long it may take; so is that it came to its end after all;
- nobody waits longer than the deadline, whatever the disk does, nor does the end of the process;
- a call that was given up learns it from `check_wanted`, which whatever makes something visible asks
  right before it does: what was given up stays invisible.
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
"""How long a caller of `Behind` waits for a disk that is not slow."""
MAX_BEHIND = 10_000
"""Writes that wait for the one under way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """`setting` is what `limit_s` was given as, for the error's cure."""

    limit_s: float
    setting: str
    told_fraction: float = 0.25
    tell: Callable[[str], None] = log.warning

    @property
    def slow_s(self) -> float:
        """From here on a write is slow."""
        return self.limit_s * self.told_fraction

    def slow(self, what: str) -> str:
        return (
            f"slow disk: {what} is not written after {self.slow_s:g} s, and has "
            f"{self.setting} = {self.limit_s:g} s"
        )

    def over(self, what: str) -> str:
        return (
            f"{what} was not written within {self.setting} = {self.limit_s:g} s: the disk is slow, or "
            "does not answer"
        )

    def wait(self, what: str, write: Callable[[], T]) -> T:
        """What `write` returns or raises. `what` names the path, too.

        Waits for: its end, in a thread. Unblocked by: that, or `StalledError` at the deadline.
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
        """`aside` with the deadline. Raises what `call` raises, and `StalledError`."""
        ends = asyncio.timeout(self.limit_s)
        try:
            async with ends, self.telling(what):
                return await aside(call, *arguments)
        except TimeoutError:
            if not ends.expired():
                raise  # its own
            raise StalledError(f"{self.over(what)}. Give it a faster disk, or raise that") from None

    @asynccontextmanager
    async def telling(self, what: str) -> AsyncIterator[None]:
        """Tell of the block when it is slow. Its deadline is the caller's."""
        timer = asyncio.get_running_loop().call_later(
            self.slow_s, lambda: self.tell(self.slow(what))
        )
        try:
            yield
        finally:
            timer.cancel()


def within(limit_s: float, what: str, call: Callable[[], T]) -> T:
    """What `call` returns or raises.

    Waits for: its end, in a thread. Unblocked by: that, or `StalledError` after `limit_s`; the thread
    is left to itself then, and makes nothing visible (`check_wanted`).
    """
    job = _Job(call)
    threading.Thread(target=job.run, name="disk", daemon=True).start()
    if not job.done.wait(limit_s):
        job.given_up = True
        raise StalledError(f"{what} was not over after {limit_s:g} s: the storage does not answer")
    return job.result()


_jobs = threading.local()
"""`running`: the jobs that this thread is inside of."""


def check_wanted(what: object) -> None:
    """Raise `StalledError` in a call that its caller has given up. `what` would become visible next."""
    if any(job.given_up for job in getattr(_jobs, "running", ())):
        raise StalledError(f"{what}: comes after its deadline and was given up; it stays invisible")


class _Job(Generic[T]):
    """One call, and what came of it. `given_up`: its caller waits no more."""

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
        # Whatever it raises is raised again where the result is asked for.
        except BaseException as error:
            self._raised = error
        finally:
            _jobs.running.remove(self)
            self.done.set()

    def result(self) -> T:
        if self._raised is not None:
            raise self._raised
        return self._returned[0]


async def aside(call: Callable[..., T], *arguments: Any) -> T:
    """What `call` returns or raises, in a daemon thread: neither the loop nor the process waits for
    it in the end, as they do for the threads of `asyncio.to_thread`.

    Waits for: the call. Cancelling leaves the thread to itself, and what it does from then on stays
    invisible (`check_wanted`).
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    job = _Job(lambda: call(*arguments))

    def tell() -> None:
        if not ended.done():
            ended.set_result(None)

    def run() -> None:
        job.run()
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(tell)

    threading.Thread(target=run, name="disk", daemon=True).start()
    try:
        await ended
    except asyncio.CancelledError:
        job.given_up = True
        raise
    return job.result()


class Latest(Generic[T]):
    """The newest answer of `look`, which asks a disk that may take very long: nobody waits for it."""

    def __init__(self, look: Callable[[], T], first: T) -> None:
        """`first` is the answer until there is one. The first look begins now."""
        self._look, self._found = look, first
        self._looking: threading.Thread | None = None
        self.value()

    def value(self) -> T:
        """The last answer, or the one before the look that is under way. Begins the next look."""
        if self._looking is None or not self._looking.is_alive():
            self._looking = threading.Thread(target=self._again, name="disk", daemon=True)
            self._looking.start()
        return self._found

    def _again(self) -> None:
        self._found = self._look()


@dataclass(slots=True, eq=False)
class Behind:
    """Writes in order, in one thread, which a caller waits for only where the disk is not slow.

    `put` waits `grace_s` for its own write, and not at all behind one that is late. At most
    `MAX_BEHIND` writes wait, each at most `patience.limit_s`. One that failed is raised by the call
    that waits for it, or by the next; what waits behind it is given up with it.
    """

    what: str
    patience: Patience
    clock: Callable[[], float] = time.monotonic
    grace_s: float = GRACE_S
    _waiting: deque[tuple[float, Callable[[], None]]] = field(default_factory=deque)
    _turn: threading.Condition = field(default_factory=threading.Condition)
    _error: BaseException | None = None
    _running: bool = False
    _told: bool = False

    def put(self, write: Callable[[], None], latest: bool = False) -> None:
        """`latest`: it takes the place of those that wait and have not begun.

        Raises what a write raised; `StalledError` when one is over its deadline, or too many wait.
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
        """Waits for: all that was put, at most the deadline. Raises as `put`."""
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
        if waited_s >= self.patience.limit_s or len(self._waiting) > MAX_BEHIND:
            raise StalledError(self.patience.over(self.what))
        if waited_s >= self.patience.slow_s and not self._told:
            self._told = True
            self.patience.tell(self.patience.slow(self.what))

    def _work(self) -> None:
        """Until nothing waits. A write stays in the line until it is over."""
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
                # It is raised where the next write is put.
                except BaseException as error:
                    self._error = error
                    self._waiting.clear()
