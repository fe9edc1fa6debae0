"""Watching over a run: worker health, and wishes to scale; and over the buffer's numbers.

Each loop ends by cancellation; a pool that used up its restarts ends the run with its first cause. The
control actor never does (`actors.control_channel`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

from actors.control_channel import ControlChannel, Wish
from actors.experience import RayBuffer
from actors.observer import RunObserver
from actors.pool import WorkerPool
from rlhf_cluster.errors import RlhfError, first_failure

LOOK_EVERY_S = 1.0


class Supervisor:
    def __init__(
        self,
        control: ControlChannel,
        pools: Sequence[WorkerPool],
        observer: RunObserver,
    ) -> None:
        self._control = control
        self._pools = {pool.kind: pool for pool in pools}
        self._observer = observer

    @asynccontextmanager
    async def watching(self, started: asyncio.Future[None]) -> AsyncIterator[None]:
        """Watch while the block runs, from when the pools have `started`. A failure of a watch loop,
        or of the start, cancels the block and is raised."""
        loops = [*(pool.supervise() for pool in self._pools.values()), self._serve_control()]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_after(started, loop)) for loop in loops]
                yield
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures

    async def _serve_control(self) -> None:
        """Waits for: wishes of other processes. Unblocked by: the next look."""
        running: set[asyncio.Task[None]] = set()
        while True:
            for wish in await self._control.exchange(asdict(self._observer.snapshot)):
                task = asyncio.create_task(self._scale(wish))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.sleep(LOOK_EVERY_S)

    async def _scale(self, wish: Wish) -> None:
        results = {}
        for kind, size in wish.sizes.items():
            self._observer.event(f"scale {kind} to {size}: asked")
            try:
                results[kind] = await self._pools[kind].resize(size)
            except RlhfError as error:
                results[kind] = f"refused: {error}"
            self._observer.event(f"scale {kind} to {size}: {results[kind]}")
        await self._control.answer(wish, results)


async def look_at_buffer(buffer: RayBuffer, observer: RunObserver) -> None:
    """Waits for: the next look. Ends by cancellation, or with the loss of the buffer."""
    while True:
        observer.buffer(await buffer.stats())
        await asyncio.sleep(LOOK_EVERY_S)


async def _after(started: asyncio.Future[None], loop: Coroutine[Any, Any, None]) -> None:
    try:
        await asyncio.shield(started)
        await loop
    finally:
        loop.close()
