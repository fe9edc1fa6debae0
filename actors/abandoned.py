"""Calls of a pool's workers that nobody waits for any more."""

from __future__ import annotations

import asyncio
from typing import Any

import ray

from actors.calls import WorkerSilent, answer
from actors.pool import Worker, WorkerPool
from rlhf_cluster.errors import RlhfError


class Abandoned:
    """Those that were given up, and that workers may still be at."""

    def __init__(self, pool: WorkerPool, silence_s: float) -> None:
        self._pool = pool
        self._silence_s = silence_s
        self._calls: list[tuple[Worker, Any]] = []

    def add(self, worker: Worker, reference: Any) -> None:
        """Cancelled: what waits in the worker does not begin, and an engine aborts its requests."""
        ray.cancel(reference)
        self._calls.append((worker, reference))

    async def end(self) -> None:
        """Waits for: each to end. A worker that is at one after `silence_s` is replaced."""
        calls, self._calls = self._calls, []
        await asyncio.gather(*(self._end(worker, reference) for worker, reference in calls))

    async def _end(self, worker: Worker, reference: Any) -> None:
        try:
            await answer(reference, self._silence_s, f"{worker.name}: a call that was given up")
        except WorkerSilent as error:
            await self._pool.fail(worker, error)
        except RlhfError:
            pass  # it has ended
