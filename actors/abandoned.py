"""Calls of a pool's workers that nobody waits for any more."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray

from actors.calls import WorkerSilent, answer
from actors.pool import State, Worker, WorkerPool
from rlhf_cluster.errors import RlhfError


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    worker: Worker
    reference: Any
    future: Future[Any]
    ends: float  # when its own deadline passes

    @property
    def is_open(self) -> bool:
        return not self.future.done() and self.worker.state is not State.RETIRED


class Abandoned:
    """Those that were given up, and that workers may still be at.

    A call of an actor with threads cannot be cancelled once it runs: its worker is healthy, and busy
    until the call's own deadline at most.
    """

    def __init__(
        self,
        pool: WorkerPool,
        clock: Callable[[], float] = time.monotonic,
        cancel: Callable[[Any], None] = lambda reference: ray.cancel(reference),
        wait: Callable[[Any, float, str], Awaitable[Any]] = answer,
    ) -> None:
        self._pool = pool
        self._clock = clock
        self._cancel, self._wait = cancel, wait
        self._calls: list[_Call] = []

    def __len__(self) -> int:
        """Those that are not known to have ended."""
        return len(self._calls)

    def add(self, worker: Worker, reference: Any, ends: float) -> None:
        """Cancelled: what waits in the worker does not begin, and an engine aborts its requests. What
        is under way ends by itself before `ends`."""
        self._cancel(reference)
        self._calls = [call for call in self._calls if call.is_open]
        future = reference.future()
        self._calls.append(_Call(worker=worker, reference=reference, future=future, ends=ends))

    async def end(self) -> None:
        """Waits for: each to end. A worker that is at one after the call's own deadline is replaced."""
        calls, self._calls = [call for call in self._calls if call.is_open], []
        await asyncio.gather(*(self._end(call) for call in calls))

    async def _end(self, call: _Call) -> None:
        left_s = max(0.0, call.ends - self._clock())
        try:
            await self._wait(
                call.reference, left_s, f"{call.worker.name}: a call that was given up"
            )
        except WorkerSilent as error:
            await self._pool.fail(call.worker, error)
        except RlhfError:
            pass  # it has ended
