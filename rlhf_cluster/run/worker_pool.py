"""A pool of replaceable workers: dispatch, health, replacement, scaling.

Promises:
- work goes to the live worker that the caller prefers, else to the one with the least in flight.
  A draining worker gets none;
- a worker that dies, hangs or fails its health check is retired (killed, its placement group released)
  and replaced. The caller may try its work again elsewhere. Where `retire` raises, the worker is
  replaced all the same, and is retired again each heartbeat;
- there are never more live workers than `wanted`, however many fail at once, and whatever change of
  size fails or is cancelled. A worker that started for a place that no longer exists is ended again;
- a worker joins only after `launch` has made it ready to serve (model loaded, weights live);
- the pool starts once `quorum` workers are live and the others take their time. Missing workers are
  reported, and join later;
- a healthy worker that is behind (`set_behind`) gets no work until it has caught up, and keeps its
  place;
- scaling down drains: the worker ends when its last work has ended. A worker in quarantine
  (`rlhf_cluster.generation.worker_quarantine`) drains too, and is then replaced;
- within the window of `restarts` there are at most `max_restarts` replacements, or one for each wanted
  worker if that is more. A rack may fail at once, and a crash loop still ends. With none left the
  pool continues with the workers that it has, and replaces again when the window allows it. With fewer
  than `quorum` of them it fails, with the first cause and not the last symptom;
- a node that stays away spends no restarts while `quorum` workers live: capacity is looked for again.

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
from rlhf_cluster.run.worker_loads import Loads, State, Worker
from rlhf_cluster.util.waiting import gather_or_cancel

log = logging.getLogger(__name__)

ROOM_AGAIN_S = 10.0
"""Seconds from a replacement that found no free resources to the next search for them."""
MAX_ERRORS = 20
"""Number of workers whose last errors are kept for messages."""


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
    join_grace_s: float = (
        30.0  # a start with its quorum returns when no worker joined for this long
    )
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
    num_quarantined: int = 0  # those of the restarts that quarantine caused
    num_autoscaled: int = 0  # changes of size by the autoscaler
    tell: Callable[[str], None] = lambda text: None
    _failure: RlhfError | None = None
    _closed: bool = False
    _num_launched: int = 0
    _num_starting: int = 0  # counted by the caller of `_add`, before the call
    _loads: Loads = field(default_factory=Loads)
    _waiting: deque[asyncio.Future[None]] = field(default_factory=deque)  # for a free worker
    _idle: dict[Worker, asyncio.Event] = field(default_factory=dict)  # of draining workers
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # held during a change of size
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
        """Number of times that a live worker came or went."""
        return self._loads.changes

    @property
    def quorum(self) -> int:
        """Live workers that the pool needs to start, and to continue without replacements."""
        least = self.limits.min_workers
        return min(self.wanted, math.ceil(self.wanted / 2) if least is None else least)

    @property
    def max_restarts(self) -> int:
        """Replacements that the window may hold."""
        most = self.limits.max_restarts
        return most and max(most, self.wanted)

    async def start(self, wanted: int) -> None:
        """Launch `wanted` workers; return when all have joined, or enough of them.

        Enough are `quorum` workers, when no other has joined for `join_grace_s`. Workers that are late
        join later. Workers that cannot start are treated as failed, and are replaced.

        Waits for: launches, each of which has its own deadlines. Raises the first failure as soon as
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
            # `_add` counts itself out, but a task cancelled before its first line never gets there.
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
        """Return the launches that are late, and the failures of others. Waits as `start`."""
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
        """Wait for a launch that was late in `start`; replace the worker if it fails.

        The launch has its own deadlines.
        """
        try:
            await launch
        except RlhfError as error:
            self.restarts.count(error)
            await self._replace()

    @asynccontextmanager
    async def acquire(
        self, prefer: Worker | None = None, avoid: Collection[Worker] = ()
    ) -> AsyncIterator[Worker]:
        """Yield a live worker with capacity, counted as busy inside the block.

        That is `prefer` if it is live and has capacity, else the least loaded. One of `avoid` is used
        only if there is no other.

        Waits for: a live worker with capacity. Unblocked by: a call that ends (each has a deadline), a
        replacement that joins. Raises `StalledError` when no worker was live for `acquire_timeout_s`.
        """
        await self._wait_for_room()
        # Without an await up to the count, no other caller takes the place that was found.
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
                    await self._wait_turn(first=again)
                again = True
            except TimeoutError:
                if self._loads:
                    continue
                raise StalledError(
                    f"no live {self.kind} worker for {self.limits.acquire_timeout_s:g} s. "
                    f"{self.describe_errors()}"
                ) from None
        self._raise_failure()

    async def _wait_turn(self, first: bool) -> None:
        """Wait for a turn; with `first` before the others, since the last turn came to nothing."""
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
        """Give the next `number` callers that wait their turn."""
        while number and self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                number -= 1

    def _update_load(self, worker: Worker) -> None:
        """Record the load of `worker`. A worker that is idle ends its drain."""
        self._loads.update(worker)
        if worker.num_in_flight == 0 and worker in self._idle:
            self._idle[worker].set()

    async def fail(self, worker: Worker, error: RlhfError) -> None:
        """Retire `worker` because of `error` and launch a replacement in the background."""
        if worker.state is State.RETIRED:
            return
        self._note(worker.name, error)
        # Read before `_remove` changes it. The task that drains a worker decides on its replacement.
        replace = worker.state in (State.LIVE, State.BEHIND)
        await self._remove(worker)
        if replace:
            self.restarts.count(error)
            self._background(self._replace())

    def set_behind(
        self, worker: Worker, why: RlhfError, catch_up: Callable[[Worker], Awaitable[None]]
    ) -> None:
        """Give `worker` no work until `catch_up` has brought it to the state of the others.

        It keeps its place meanwhile. It is replaced if `catch_up` fails.
        """
        if worker.state is not State.LIVE:
            return
        self._note(worker.name, why)
        worker.state = State.BEHIND
        self._background(self._back(worker, catch_up))

    async def _back(self, worker: Worker, catch_up: Callable[[Worker], Awaitable[None]]) -> None:
        """Make `worker` live after `catch_up`, or replace it. Waits for: `catch_up`, with deadlines."""
        try:
            await catch_up(worker)
        except RlhfError as error:
            await self.fail(worker, error)
            return
        if worker.state is State.BEHIND:
            worker.state = State.LIVE
            self._wake(self.limits.max_in_flight or len(self._waiting))

    async def suspect(self, worker: Worker, error: RlhfError) -> None:
        """Note an error that the worker itself reported, and retire it if it cannot serve any more."""
        self._note(worker.name, error)
        if worker.state is not State.RETIRED:
            await self._check_one(worker)

    async def quarantine(self, worker: Worker, reason: str, needed: bool = False) -> None:
        """Give `worker` no more work, and replace it once it has done what it has.

        The last live worker is replaced at once, since no other can serve meanwhile. When no restart is
        left the worker stays, unless it is `needed`: then the pool fails with the first cause.
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
        """Drain `worker`, then replace it: the replacement needs its place."""
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
        """Add workers, or drain the least loaded ones. Return what was done.

        A worker that is being replaced leaves before one that lives. All new workers join, or none.
        Nothing starts before `preflight` has found resources for the wanted size, or that nodes for it
        may come. The first error of a start is raised, and the workers started with it are ended again.

        Waits for: the change before it; then the new workers to be ready, or the drained ones to be
        idle. All have deadlines. When cancelled it ends the workers that it started, and the drain
        continues in the background.
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
        """Add `change` workers: all of them join, or none.

        Waits for: them. If one fails it waits for the drain of those that exceed the size before, which
        are fewer where others died meanwhile.
        """
        try:
            await self._add_all(change)
        except BaseException:
            self.wanted -= change
            await self._drain_surplus()
            raise

    async def _drain_surplus(self) -> None:
        """Drain the workers that exceed the size: first those behind, then the least loaded.

        Among equals the newest is first. Waits for: all that drain, also after its caller is cancelled.
        """
        staying = self._staying[::-1]
        staying.sort(key=lambda w: (w.state is State.LIVE, w.num_in_flight))
        for worker in staying[: max(0, len(staying) - self.wanted)]:
            worker.state = State.DRAINING
        draining = [w for w in self.workers if w.state is State.DRAINING]
        # Tasks of the pool, which `wait` does not cancel with its caller as `gather` would.
        if tasks := [self._background(self._drain(worker)) for worker in draining]:
            await asyncio.wait(tasks)

    def close(self) -> None:
        """Stop replacing, and retire every worker; one that is starting is retired once it exists."""
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
        """Add `number` workers concurrently. The first failure ends the others, and is raised."""
        num_begun = 0

        async def add() -> None:
            nonlocal num_begun
            num_begun += 1
            await self._add()

        self._num_starting += number
        try:
            await gather_or_cancel(add() for _ in range(number))
        finally:
            self._num_starting -= number - num_begun

    async def _add(self) -> None:
        """Launch a worker that joins, or is ended if its place no longer exists."""
        name = f"{self.kind}-{self._num_launched}"
        self._num_launched += 1
        try:
            worker = await self.launch(name)
        except RlhfError as error:
            self._note(name, error)
            raise
        finally:
            self._num_starting -= 1
        if worker.state is State.RETIRED:  # it joined as one that is behind, and has failed since
            return
        if self._closed or len(self._staying) >= self.wanted:
            self._retire(worker)
            return
        self.workers.append(worker)
        worker.changed = self._update_load
        self._update_load(worker)
        self._wake(self.limits.max_in_flight or len(self._waiting))

    @property
    def _staying(self) -> list[Worker]:
        """Workers that have a place: live, or behind."""
        return [w for w in self.workers if w.state in (State.LIVE, State.BEHIND)]

    @property
    def _is_short(self) -> bool:
        return not self._closed and len(self._staying) + self._num_starting < self.wanted

    async def _replace(self) -> None:
        """Launch workers until the pool has its size, together with what other tasks start.

        Waits for: the backoff, which grows with the restarts per worker; a launch, which has deadlines;
        capacity; with no restart left, the oldest one to leave the window. Ends when the pool has its
        size, is closed, or has failed.
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
            # `wanted` is not 0 here: a pool of that size is not short.
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
        """Make all callers that wait, and `supervise`, raise `failure`."""
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
        """Retire `worker`. If that raises, the pool continues without it, and tries again later."""
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
        """Retire again the workers whose `retire` raised, until it succeeds."""
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
        while len(self.last_errors) > MAX_ERRORS:  # the oldest is of a worker that ended long ago
            del self.last_errors[next(iter(self.last_errors))]

    def _background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish_background)
        return task

    def _finish_background(self, task: asyncio.Task[None]) -> None:
        """Fail the pool on an unexpected error, which would leave it short for good."""
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            text = f"{self.kind}: a change of workers failed: {type(error).__name__}: {error}"
            self._fail_for_good(PoolLost(text), error)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
