"""Supervision of a run: worker health, scale requests, autoscaling, and the buffer's statistics.

Each loop ends by cancellation. A pool that has used all its restarts ends the run with the pool's root
cause. A failure of the control actor never ends the run (`actors.services.control_actor`).
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from ray.exceptions import RayError

from actors.drivers.rl_observer import RunObserver
from actors.services.buffer_actor import RayBuffer
from actors.services.control_actor import ControlChannel, Wish
from rlhf_cluster.config.pools import no_such_pool
from rlhf_cluster.errors import RlhfError, first_failure
from rlhf_cluster.run.autoscaler import Action, Autoscaler
from rlhf_cluster.run.bottleneck_advisor import Advice
from rlhf_cluster.run.worker_pool import WorkerPool
from rlhf_cluster.util.waiting import gather_or_cancel

LOOK_EVERY_S = 1.0


class Supervisor:
    def __init__(
        self,
        control: ControlChannel,
        pools: Sequence[WorkerPool],
        observer: RunObserver,
        scaler: Autoscaler | None = None,
        clock: Callable[[], float] = time.monotonic,
        look_every_s: float = LOOK_EVERY_S,
    ) -> None:
        """`scaler`: None disables autoscaling, so pools change on request only."""
        self._control = control
        self._pools = {pool.kind: pool for pool in pools}
        self._observer = observer
        self._scaler, self._clock, self._look_every_s = scaler, clock, look_every_s
        self._turns: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    @asynccontextmanager
    async def watching(self, started: asyncio.Future[None]) -> AsyncIterator[None]:
        """Watch the pools while the block runs, once they have `started`.

        A failure of a watch loop, or of the start, cancels the block and is raised.
        """
        loops = [*(pool.supervise() for pool in self._pools.values()), self._serve_control()]
        if self._scaler is not None:
            loops.append(self._autoscale(self._scaler))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(_after(started, loop)) for loop in loops]
                yield
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures

    async def _serve_control(self) -> None:
        """Poll the control actor, and carry out the scale requests of other processes.

        Waits for: the next poll. Ends by cancellation.
        """
        async with asyncio.TaskGroup() as scaling:
            while True:
                for wish in await self._control.exchange():
                    scaling.create_task(self._scale(wish))
                await asyncio.sleep(self._look_every_s)

    async def _scale(self, wish: Wish) -> None:
        """Resize the pools of a request concurrently, so that none waits for another's workers."""
        results = await gather_or_cancel(self._scale_one(*asked) for asked in wish.sizes.items())
        self._control.answer(wish, dict(zip(wish.sizes, results, strict=True)))

    async def _scale_one(self, kind: str, size: int) -> str:
        if kind not in self._pools:
            return no_such_pool(kind, self._pools)
        result = await self._resize(kind, size, "asked")
        if self._scaler is not None:
            self._scaler.resized_by_hand(self._clock(), kind)
        return result

    async def _resize(self, kind: str, size: int, why: str) -> str:
        """Resize one pool. Returns what was done, or "refused: " and the reason.

        It does not raise errors that concern this pool alone.

        Waits for: an earlier change of this pool to end; then like `WorkerPool.resize`.
        """
        async with self._turns[kind]:
            self._observer.event(f"scale {kind} to {size}: {why}")
            try:
                result = await self._pools[kind].resize(size)
            except (RlhfError, RayError) as error:
                result = f"refused: {error}"
            self._observer.event(f"scale {kind} to {size}: {result}")
        return result

    async def _autoscale(self, scaler: Autoscaler) -> None:
        """Apply the decisions of `scaler` while the pools are settled.

        Waits for: the next look. Ends by cancellation.
        """
        while True:
            await asyncio.sleep(self._look_every_s)
            advice = self._observer.advice
            if advice is None or not self.settled:
                continue
            sizes = {kind: pool.wanted for kind, pool in self._pools.items()}
            decision = scaler.decide(self._clock(), advice, sizes)
            if decision.note is not None:
                self._observer.event(f"autoscale: {decision.note}")
            if decision.action is not None:
                await self._act(scaler, decision.action, advice)

    async def _act(self, scaler: Autoscaler, action: Action, advice: Advice) -> None:
        why = f"autoscale: {action.reason}"
        result = await self._resize(action.pool, action.size, why)
        if result.startswith("refused"):
            scaler.refused(self._clock(), action)
        else:
            self._pools[action.pool].num_autoscaled += 1
            scaler.changed(self._clock(), action, advice)

    @property
    def settled(self) -> bool:
        """Whether every pool has the wanted number of workers, and none is being changed."""
        changing = any(turn.locked() for turn in self._turns.values())
        return not changing and all(len(p.live) == p.wanted for p in self._pools.values())


async def look_at_buffer(buffer: RayBuffer, observer: RunObserver) -> None:
    """Poll the buffer's statistics and record them.

    Waits for: the next poll. Ends by cancellation, or when the buffer fails.
    """
    while True:
        observer.buffer(await buffer.stats())
        await asyncio.sleep(LOOK_EVERY_S)


async def _after(started: asyncio.Future[None], loop: Coroutine[Any, Any, None]) -> None:
    try:
        await asyncio.shield(started)
        await loop
    finally:
        loop.close()
