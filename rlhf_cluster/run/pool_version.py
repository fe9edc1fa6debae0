"""Bringing a pool's workers to a version of weights: the policy's for generation, the reference's for
scoring.

Promises:
- a slow storage costs no healthy worker its place: one that refuses a version, or does not take it in
  time, is asked a second time, and gets no work from then on until it runs the newest version;
- nobody works with weights that are older than the target once `move` has returned;
- where fewer workers than the pool's quorum take a version it is not the target, and `WeightError`
  says why: no worker is to blame;
- a worker gets work only with the newest target, whatever moved while it loaded; one that joins while
  the storage is slow keeps its place, and catches up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from rlhf_cluster.errors import (
    RlhfError,
    StalledError,
    WeightError,
    WorkerDied,
    WorkerError,
    WorkerSilent,
)
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.run.worker_pool import (
    State,
    Worker,
    WorkerPool,
)

LATE_OR_REFUSED = (WeightError, StalledError, WorkerSilent)
"""What a load ends with where the storage is slow or the version damaged, and the worker is well."""
MAX_CATCH_UP = 3
"""How often a worker that was left behind is brought to the newest version before it is replaced."""
PAUSE_S = 2.0
"""Before the first of these; longer before the next: a storage may refuse at once, for a moment."""


class PoolVersion:
    """Owns which version the workers of `pool` run. `load` brings one worker to a version, within a
    deadline; `what` is the noun of errors."""

    def __init__(
        self,
        pool: WorkerPool,
        load: Callable[[Worker, WeightVersion], Awaitable[None]],
        what: str = "version",
    ) -> None:
        self._pool = pool
        self._load = load
        self._what = what
        self.target: WeightVersion | None = None

    async def move(self, version: WeightVersion) -> None:
        """Make `version` the target: every worker that is live afterwards has said that it runs it.

        Waits for: every live worker, at most twice the deadline of `load` and of a health check. A
        worker that died or cannot serve is replaced. Without any worker it waits for one, as
        `WorkerPool.acquire`, which joins with this version. Raises `WeightError`, with a worker's
        words; the target is as before then.
        """
        before, self.target = self.target, version
        behind = await self._ask(list(self._pool.live), version)
        if behind:
            behind = await self._ask(list(behind), version)
        if not self._pool.live:
            async with self._pool.acquire():
                pass
        # a worker that joined meanwhile runs the version too: `join` looks at the target
        num_loaded = sum(w not in behind for w in self._pool.live)
        needed = max(1, self._pool.quorum)
        if behind and num_loaded < needed:
            self.target = before
            raise WeightError(
                f"{self._what} {version.version} is not live: {num_loaded} of {len(self._pool.live)} "
                f"{self._pool.kind} workers took it, {needed} are needed. "
                f"{next(iter(behind.values()))}"
            )
        for worker, why in behind.items():
            self._pool.set_behind(worker, why, self._catch_up)

    async def join(self, worker: Worker) -> None:
        """Bring a new worker to the target, if there is one, before it gets work. One that is late or
        refuses it twice joins behind the others.

        Waits for: its load, again while the target moves, and once more where it was refused or
        late; each has its deadline.
        """
        try:
            await self._bring(worker)
        except LATE_OR_REFUSED as why:
            self._pool.set_behind(worker, why, self._catch_up)

    async def _bring(self, worker: Worker) -> None:
        """Waits as `join`; raises what the second try of a load ended with."""
        while (target := self.target) is not None:
            try:
                await self._load(worker, target)
            except LATE_OR_REFUSED:
                await self._load(worker, target)
            if self.target is target:
                return

    async def _catch_up(self, worker: Worker) -> None:
        """`_bring` for a worker that was left behind, a few times: what it reads from may be slow.

        Waits for: a pause, then its loads, each with its deadline. Raises the last try's error.
        """
        for num_tries in range(1, MAX_CATCH_UP + 1):
            await self._pool.sleep(PAUSE_S * num_tries)
            try:
                await self._bring(worker)
                return
            except LATE_OR_REFUSED:
                if num_tries == MAX_CATCH_UP:
                    raise

    async def _ask(
        self, workers: Sequence[Worker], version: WeightVersion
    ) -> dict[Worker, RlhfError]:
        """Why workers that are still live did not take `version`. Those that failed are retired."""
        answers = await asyncio.gather(*(self._load_or_fail(w, version) for w in workers))
        pairs = zip(workers, answers, strict=True)
        return {w: why for w, why in pairs if why is not None and w.state is State.LIVE}

    async def _load_or_fail(self, worker: Worker, version: WeightVersion) -> RlhfError | None:
        """Why a worker, which is healthy, did not take `version`; None where it did, or was retired."""
        try:
            await self._load(worker, version)
        except WorkerDied as error:
            await self._pool.fail(worker, error)
        except (WorkerError, StalledError, WeightError) as error:
            # late or refused: its weights may be lost, or it may be well and its storage slow
            await self._pool.suspect(worker, error)
            return error
        return None
