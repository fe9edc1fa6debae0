"""A pool of replaceable workers: dispatch, health, replacement, scaling.

Promises:
- work goes to the live worker that the caller prefers, else to the one with the least in flight;
  a draining worker gets none;
- a worker that dies, hangs or fails its health check is retired (killed, its placement group given
  back) and replaced; its work is the caller's to try again elsewhere; where `retire` raises, its place
  is filled all the same, and it is retired again each heartbeat;
- there are never more live workers than `wanted`, however many are lost at once, whatever change of
  size fails or is cancelled; one that has started for a place that is gone is ended again;
- a worker joins only after `launch` has made it ready to serve (model loaded, weights live);
- the pool starts once `quorum` workers are live and the others take their time; who is missing is
  reported, and joins later;
- a healthy worker that is behind (`set_behind`) gets no work until it has caught up, and keeps its
  place;
- scaling down drains: the worker ends when its last work has ended; so does one in quarantine
  (`rlhf_cluster.generation.worker_quarantine`), which is then replaced;
- within the window of `restarts` there are at most `max_restarts` replacements, or one for each wanted
  worker if that is more: a rack may be lost at once, and a crash loop still ends. With none left the
  pool goes on with the workers that it has, and replaces again when the window allows it; with fewer
  than `quorum` of them it fails, with the first cause and not the last symptom;
- a node that stays away spends no restarts while `quorum` workers live: room is looked for again.

The pool decides nothing about Ray: launching and killing are arguments.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from rlhf_cluster.errors import PlacementError, PoolLost, RlhfError, StalledError, WorkerError
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.run.worker_loads import (
    Loads,
    State,
    Worker,
)
from rlhf_cluster.util.concurrency import together

log = logging.getLogger(__name__)

ROOM_AGAIN_S = 10.0
"""From a replacement that found no room to the next search for it."""
MAX_ERRORS = 20
"""Workers whose last errors are kept for messages."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolLimits:
    """Deadlines in seconds, how many workers a pool needs, and how many it may replace."""

    heartbeat_s: float = 5.0
    heartbeat_timeout_s: float = 60.0
    acquire_timeout_s: float = 300.0
    drain_timeout_s: float = 600.0
    backoff_s: float = 1.0
    max_restarts: int = 10  # within the window of `WorkerPool.restarts`; 0: none ever
    min_workers: int | None = None  # None: half of what is wanted, rounded up
    join_grace_s: float = 30.0  # a start with its quorum goes on when nobody joined for so long
    max_in_flight: int | None = None  # calls that one worker takes at once; the rest wait here


@dataclass(slots=True, kw_only=True, eq=False)
class WorkerPool:
    """Workers of one kind. All methods run on one event loop."""

    kind: str
    launch: Callable[[str], Awaitable[Worker]]
    retire: Callable[[Worker], None]
    check: Callable[[Worker], Awaitable[None]]
    limits: PoolLimits
    preflight: Callable[[int], None] = lambda wanted: None
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    wanted: int = 0
    workers: list[Worker] = field(default_factory=list)
    last_errors: dict[str, str] = field(default_factory=dict)
    restarts: RestartWindow = field(default_factory=RestartWindow)
    num_quarantined: int = 0  # of them
    num_autoscaled: int = 0  # changes of size that nobody asked for
    tell: Callable[[str], None] = lambda text: None
    _failure: RlhfError | None = None
    _closed: bool = False
    _num_launched: int = 0
    _num_starting: int = 0  # counted by who calls `_add`, before the call
    _loads: Loads = field(default_factory=Loads)
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque)  # for room
    _idle: dict[Worker, asyncio.Event] = field(default_factory=dict)  # of those that are drained
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # of a change of size
    _not_ended: list[Worker] = field(default_factory=list)  # whose `retire` raised

    @property
    def live(self) -> list[Worker]:
        return [w for w in self.workers if w.state is State.LIVE]

    @property
    def num_live(self) -> int:
        return len(self._loads)

    @property
    def num_behind(self) -> int:
        """Healthy workers without the newest weights, which get no work until they have them."""
        return sum(w.state is State.BEHIND for w in self.workers)

    @property
    def changes(self) -> int:
        """How often a live worker came or went."""
        return self._loads.changes

    @property
    def quorum(self) -> int:
        """How many live workers the pool needs to start, and to live on without replacements."""
        least = self.limits.min_workers
        return min(self.wanted, math.ceil(self.wanted / 2) if least is None else least)

    @property
    def max_restarts(self) -> int:
        """Replacements that the window may hold."""
        most = self.limits.max_restarts
        return most and max(most, self.wanted)

    async def start(self, wanted: int) -> None:
        """Launch `wanted` workers; return when all have joined, or `quorum` of them have and nobody
        else did for `join_grace_s`. Those that are late join later; those that cannot start count as
        lost, and are replaced.

        Waits for: launches, each of which has deadlines of its own. Raises the first failure as soon as
        the quorum is out of reach, and ends the other launches.
        """
        self.wanted = wanted
        self._num_starting += wanted
        begun: list[asyncio.Task[None]] = []
        launches = {asyncio.ensure_future(self._begin(begun)) for _ in range(wanted)}
        try:
            late, failures = await self._until_quorum(launches)
        except BaseException:
            for launch in launches:
                launch.cancel()
            await asyncio.gather(*launches, return_exceptions=True)
            self._num_starting -= wanted - len(begun)
            raise
        if late or failures:
            causes = "".join(f"; {error}" for error in failures)
            self.tell(
                f"{self.kind}: started with {self.num_live} of {wanted} workers, {len(late)} still "
                f"starting, {len(failures)} failed{causes}"
            )
        for launch in late:
            self._background(self._join_late(launch))
        for error in failures:
            self.restarts.count(error)
            self._background(self._replace())

    async def _begin(self, begun: list[asyncio.Task[None]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        begun.append(task)
        await self._add()

    async def _until_quorum(
        self, launches: set[asyncio.Task[None]]
    ) -> tuple[set[asyncio.Task[None]], list[RlhfError]]:
        """The launches that are late, and the failures of others. Waits as `start`."""
        pending, failures = set(launches), list[RlhfError]()
        while pending:
            grace_s = self.limits.join_grace_s if self.num_live >= self.quorum else None
            done, pending = await asyncio.wait(
                pending, timeout=grace_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                break
            for launch in done:
                error = launch.exception()
                if isinstance(error, RlhfError):
                    failures.append(error)
                elif error is not None:
                    raise error
            if len(failures) > len(launches) - self.quorum:
                raise failures[0]
        return pending, failures

    async def _join_late(self, launch: asyncio.Task[None]) -> None:
        """Waits for: a launch that was left behind by `start`, which has deadlines of its own."""
        try:
            await launch
        except RlhfError as error:
            self.restarts.count(error)
            await self._replace()

    @asynccontextmanager
    async def acquire(
        self, prefer: Worker | None = None, avoid: Collection[Worker] = ()
    ) -> AsyncIterator[Worker]:
        """A live worker with room, counted as busy inside the block: `prefer` if it is one, else
        the least loaded, of `avoid` only where there is no other.

        Waits for: a live worker with room. Unblocked by: a call that ends (each has a deadline), a
        replacement that joins. `StalledError` when there was no live worker for
        `acquire_timeout_s`.
        """
        await self._wait_for_room()
        if prefer is None or prefer.state is not State.LIVE or not self._has_room(prefer):
            worker = self._loads.least(self.limits.max_in_flight, avoid)
        else:
            worker = prefer
        worker.num_in_flight += 1
        try:
            yield worker
        finally:
            worker.num_in_flight -= 1
            if worker.state is State.LIVE and self._has_room(worker):
                self._wake(1)

    def _has_room(self, worker: Worker) -> bool:
        limit = self.limits.max_in_flight
        return limit is None or worker.num_in_flight < limit

    async def _wait_for_room(self) -> None:
        again = False
        while not self._loads.has_room(self.limits.max_in_flight):
            self._raise_failure()
            try:
                async with asyncio.timeout(self.limits.acquire_timeout_s):
                    await self._woken(first=again)
                again = True
            except TimeoutError:
                if self._loads:
                    continue
                raise StalledError(
                    f"no live {self.kind} worker for {self.limits.acquire_timeout_s:g} s. "
                    f"{self.describe_errors()}"
                ) from None
        self._raise_failure()

    async def _woken(self, first: bool) -> None:
        """Waits for: its turn, before the others' where it had its turn and came too late for it."""
        turn = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if first else self._waiting.append)(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn in self._waiting:
                self._waiting.remove(turn)
            elif self._loads.has_room(self.limits.max_in_flight):
                self._wake(1)  # its turn passes on
            raise

    def _wake(self, number: int) -> None:
        """The next so many of those who wait."""
        while number and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                number -= 1

    def _worker_changed(self, worker: Worker) -> None:
        """A worker that is idle ends its drain."""
        self._loads.update(worker)
        if worker.num_in_flight == 0 and worker in self._idle:
            self._idle[worker].set()

    async def fail(self, worker: Worker, error: RlhfError) -> None:
        """Retire `worker` because of `error` and launch a replacement in the background."""
        if worker.state is State.RETIRED:
            return
        self._note(worker.name, error)
        replace = worker.state in (State.LIVE, State.BEHIND)
        await self._remove(worker)
        if replace:
            self.restarts.count(error)
            self._background(self._replace())

    def set_behind(
        self, worker: Worker, why: RlhfError, catch_up: Callable[[Worker], Awaitable[None]]
    ) -> None:
        """Give `worker` no work until `catch_up` has brought it where the others are; its place is kept
        meanwhile. Where that fails it is replaced."""
        if worker.state is not State.LIVE:
            return
        self._note(worker.name, why)
        worker.state = State.BEHIND
        self._background(self._back(worker, catch_up))

    async def _back(self, worker: Worker, catch_up: Callable[[Worker], Awaitable[None]]) -> None:
        """Waits for: `catch_up`, which has deadlines."""
        try:
            await catch_up(worker)
        except RlhfError as error:
            await self.fail(worker, error)
            return
        if worker.state is State.BEHIND:
            worker.state = State.LIVE
            self._wake(self.limits.max_in_flight or len(self._waiting))

    async def suspect(self, worker: Worker, error: RlhfError) -> None:
        """Note an error that the worker itself reported, and retire it if it cannot serve on."""
        self._note(worker.name, error)
        if worker.state is not State.RETIRED:
            await self._check_one(worker)

    async def quarantine(self, worker: Worker, reason: str, needed: bool = False) -> None:
        """Give `worker` no more work, and replace it once it has done what it has.

        The last live worker, which nobody can stand in for meanwhile, is replaced at once. Where no
        restart is left it stays, unless it is `needed`: then the pool fails with the first cause.
        """
        spent = self.restarts.recent >= self.max_restarts
        if worker.state is not State.LIVE or (spent and not needed):
            return
        error = WorkerError(f"{worker.name}: quarantined: {reason}")
        self.num_quarantined += 1
        self.tell(str(error))
        if len(self.live) == 1:
            await self.fail(worker, error)
            return
        self._note(worker.name, error)
        worker.state = State.DRAINING
        self.restarts.count(error)
        self._background(self._drain_and_replace(worker))

    async def _drain_and_replace(self, worker: Worker) -> None:
        """Its place is needed for the replacement."""
        await self._drain(worker)
        await self._replace()

    async def supervise(self) -> None:
        """Check every worker each heartbeat. Ends by cancellation, or raises the pool's failure."""
        while True:
            await self.sleep(self.limits.heartbeat_s)
            self._raise_failure()
            await asyncio.gather(*(self._check_one(w) for w in self._staying))
            self._retire_again()

    async def resize(self, wanted: int) -> str:
        """Add workers, or drain the least loaded ones. Returns what was done. A worker that is being
        replaced leaves before one that lives.

        All new workers join, or none: nothing starts before `preflight` has found room for the
        wanted size, or that nodes for it may come; the first that cannot start is raised, and those
        that were started beside it are ended again.

        Waits for: the change before it; then the new workers to be ready, or the drained ones to be
        idle. All have deadlines. Cancelled, it ends those that it started, and drains on behind.
        """
        async with self._turn:
            change = wanted - self.wanted
            if change > 0:
                self.preflight(wanted)
            self.wanted = wanted
            if change > 0:
                await self._grow(change)
            await self._drain_surplus()
            return f"{self.kind}: {len(self.live)} workers"

    async def _grow(self, change: int) -> None:
        """All of them join, or none. Waits for: them; where one fails, for as many to drain as are over
        the size before: fewer where others died meanwhile."""
        try:
            await self._add_all(change)
        except BaseException:
            self.wanted -= change
            await self._drain_surplus()
            raise

    async def _drain_surplus(self) -> None:
        """Drain those that are over the size: first those behind, then the least loaded, the newest of
        equals.

        Waits for: all that drain. A caller that is cancelled leaves them to it.
        """
        staying = self._staying[::-1]
        staying.sort(key=lambda w: (w.state is State.LIVE, w.num_in_flight))
        for worker in staying[: max(0, len(staying) - self.wanted)]:
            worker.state = State.DRAINING
        draining = [w for w in self.workers if w.state is State.DRAINING]
        if tasks := [self._background(self._drain(worker)) for worker in draining]:
            await asyncio.wait(tasks)

    def close(self) -> None:
        """Retire every worker, those that start as soon as they are there, and stop replacing."""
        self._closed = True
        self.wanted = 0
        for task in self._tasks:
            task.cancel()
        self._retire_again()
        for worker in self.workers:
            worker.state = State.RETIRED
            self._retire(worker)
        self.workers.clear()

    def describe_errors(self) -> str:
        if not self.last_errors:
            return f"No {self.kind} worker has reported an error"
        return "; ".join(f"{name}: last error: {text}" for name, text in self.last_errors.items())

    async def _add_all(self, number: int) -> None:
        """At once. The first failure to launch ends the others, and is raised."""
        num_begun = 0

        async def add() -> None:
            nonlocal num_begun
            num_begun += 1
            await self._add()

        self._num_starting += number
        try:
            await together(add() for _ in range(number))
        finally:
            self._num_starting -= number - num_begun

    async def _add(self) -> None:
        """A new worker joins, unless its place is gone meanwhile: then it is ended."""
        name = f"{self.kind}-{self._num_launched}"
        self._num_launched += 1
        try:
            worker = await self.launch(name)
        except RlhfError as error:
            self._note(name, error)
            raise
        finally:
            self._num_starting -= 1
        if worker.state is State.RETIRED:  # it joined behind, and has failed since
            return
        if self._closed or len(self._staying) >= self.wanted:
            self._retire(worker)
            return
        self.workers.append(worker)
        worker.changed = self._worker_changed
        self._worker_changed(worker)
        self._wake(self.limits.max_in_flight or len(self._waiting))

    @property
    def _staying(self) -> list[Worker]:
        """Those that have a place: live, or behind."""
        return [w for w in self.workers if w.state in (State.LIVE, State.BEHIND)]

    @property
    def _is_short(self) -> bool:
        return not self._closed and len(self._staying) + self._num_starting < self.wanted

    async def _replace(self) -> None:
        """Launch until the pool has its size again, with what others start.

        Waits for: the backoff, which grows with the restarts a worker; a launch, which has deadlines;
        room; with no restart left, the oldest one to leave the window. Ends with the pool's size, its
        end, or its failure.
        """
        told_no_room = False
        while self._is_short and self._failure is None:
            recent, most = self.restarts.recent, self.max_restarts
            if recent > most or not most:
                if self.num_live < self.quorum:
                    self._give_up(recent)
                if self.num_live < self.quorum or not most:
                    return
                await self.sleep(max(1.0, self.restarts.until_one_leaves_s))
                continue
            await self.sleep(self.limits.backoff_s * min(math.ceil(recent / self.wanted), 30))
            if not self._is_short:
                return
            self._num_starting += 1
            try:
                await self._add()
            except RlhfError as error:
                if not isinstance(error, PlacementError) or self.num_live < self.quorum:
                    self.restarts.count(error)
                    continue
                if not told_no_room:
                    self.tell(f"{self.kind}: a replacement waits for room: {error}")
                told_no_room = True
                await self.sleep(ROOM_AGAIN_S)

    def _give_up(self, recent: int) -> None:
        first = self.restarts.first_cause
        text = (
            f"{self.kind}: {recent} restarts within {self.restarts.window_s:g} s, more than "
            f"{self.max_restarts}, and {self.num_live} of at least {self.quorum} workers live. "
            f"First cause: {first}"
        )
        self._fail_for_good(PoolLost(text), first)

    def _fail_for_good(self, failure: RlhfError, cause: BaseException | None) -> None:
        """Who waits, and the supervision, raise it."""
        failure.__cause__ = cause
        self._failure = self._failure or failure
        self._wake(len(self._waiting))

    async def _check_one(self, worker: Worker) -> None:
        try:
            await self.check(worker)
        except RlhfError as error:
            await self.fail(worker, error)

    async def _drain(self, worker: Worker) -> None:
        if worker.state is State.RETIRED:
            return
        idle = self._idle.setdefault(worker, asyncio.Event())
        if worker.num_in_flight == 0:
            idle.set()
        try:
            async with asyncio.timeout(self.limits.drain_timeout_s):
                await idle.wait()
        except TimeoutError:
            log.warning("%s: still busy at the drain deadline, ended anyway", worker.name)
        await self._remove(worker)

    async def _remove(self, worker: Worker) -> None:
        if worker.state is State.RETIRED:
            return
        worker.state = State.RETIRED
        if worker in self.workers:
            self.workers.remove(worker)
        if worker in self._idle:
            self._idle.pop(worker).set()
        self._retire(worker)

    def _retire(self, worker: Worker) -> None:
        """Whatever it raises, the pool goes on without the worker: it is not among `workers`."""
        try:
            self.retire(worker)
        except Exception as error:
            log.exception("%s: not ended", worker.name)
            self.tell(
                f"{worker.name} could not be ended ({type(error).__name__}: {error}); it is tried "
                "again, and may hold its place until then"
            )
            self._not_ended.append(worker)

    def _retire_again(self) -> None:
        """Those that could not be ended before, the first time that it works for the last."""
        for worker in self._not_ended[:]:
            try:
                self.retire(worker)
            except Exception as error:
                log.info("%s: still not ended: %s", worker.name, error)
            else:
                self._not_ended.remove(worker)

    def _note(self, name: str, error: RlhfError) -> None:
        log.warning("%s: %s", name, error)
        self.last_errors.pop(name, None)
        self.last_errors[name] = str(error)
        while len(self.last_errors) > MAX_ERRORS:  # of those that are long gone, the oldest first
            del self.last_errors[next(iter(self.last_errors))]

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._background_ended)
        return task

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        """A fault of the system there must not leave the pool short for good."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            text = f"{self.kind}: a change of workers failed: {type(error).__name__}: {error}"
            self._fail_for_good(PoolLost(text), error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
