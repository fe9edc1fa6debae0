"""Version of weights that the workers of a pool run.

For generation it is a version of the policy, for scoring one of the reference.

Promises:
- slow storage costs no healthy worker its place. A worker that refuses a version, or does not load it
  in time, is asked a second time. After that it gets no work until it runs the newest version;
- once `move` has returned, no worker serves with weights that are older than the target;
- a version that fewer workers than the pool's quorum load does not become the target. `WeightError`
  says why, and no worker is blamed;
- a worker gets work only with the newest target, also when the target moved while it loaded. A worker
  that joins while the storage is slow keeps its place, and catches up.
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
"""Errors of a load when the storage is slow or the version damaged, but the worker healthy."""
MAX_CATCH_UP = 3
"""Tries to bring a worker that is behind to the newest version before it is replaced."""
PAUSE_S = 6.0
"""Seconds before the first of these tries, longer before the next.

All pauses together outlast a storage that refuses at once for half a minute.
"""


class PoolVersion:
    """Owner of the version that the workers of `pool` run.

    `load` brings one worker to a version, within a deadline. `what` is the noun of error messages.
    """

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
        """Make `version` the target. Every worker that is live afterwards has said that it runs it.

        Waits for: every live worker, at most twice the deadline of `load` and of a health check. A
        worker that died or cannot serve is replaced. Without any worker it waits, as
        `WorkerPool.acquire`, for one that joins with this version.

        Raises `WeightError` with a worker's message. The target is then the previous one.
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
        """Bring a new worker to the target, if there is one, before it gets work.

        A worker that is late twice, or refuses the target twice, joins as one that is behind.

        Waits for: its load, again when the target moves, and once more when it was refused or late.
        Each load has its deadline.
        """
        try:
            await self._bring(worker)
        except LATE_OR_REFUSED as why:
            self._pool.set_behind(worker, why, self._catch_up)

    async def _bring(self, worker: Worker) -> None:
        """Load the target into `worker`, again when the target moved meanwhile.

        A load that was late or refused is tried a second time. Waits as `join`. Raises the error of
        the second try.
        """
        while (target := self.target) is not None:
            try:
                await self._load(worker, target)
            except LATE_OR_REFUSED:
                await self._load(worker, target)
            if self.target is target:
                return

    async def _catch_up(self, worker: Worker) -> None:
        """Call `_bring` up to `MAX_CATCH_UP` times, since the storage may be slow.

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
        """Load `version` into `workers`; return the errors of live ones that did not load it.

        Workers that failed are retired.
        """
        answers = await asyncio.gather(*(self._load_or_fail(w, version) for w in workers))
        pairs = zip(workers, answers, strict=True)
        return {w: why for w, why in pairs if why is not None and w.state is State.LIVE}

    async def _load_or_fail(self, worker: Worker, version: WeightVersion) -> RlhfError | None:
        """Load `version` into `worker`; return the error of one that did not load it.

        None means that the worker loaded it, or died. A worker that died is retired. One that
        reported an error is checked, and retired if it cannot serve.
        """
        try:
            await self._load(worker, version)
        except WorkerDied as error:
            await self._pool.fail(worker, error)
        except (WorkerError, StalledError, WeightError) as error:
            # late or refused: its weights may be lost, or it may be well and its storage slow
            await self._pool.suspect(worker, error)
            return error
        return None
