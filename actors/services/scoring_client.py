"""Scoring port over the pools of actors that score."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

from actors.cluster.calls import answer
from actors.services.generation_client import Abandoned, Answered, try_workers
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import EXACT, REFERENCE, SCORING, Scoring
from rlhf_cluster.errors import StalledError, WeightError, WorkerError
from rlhf_cluster.observe.occupancy import Occupancy
from rlhf_cluster.records import GroupSummary, Handle, WeightVersion
from rlhf_cluster.run.pool_version import PoolVersion
from rlhf_cluster.run.worker_pool import State, Worker, WorkerPool
from rlhf_cluster.scoring.moving_reference import ReferenceKeeper
from rlhf_cluster.sections.rl_run import Buffer
from rlhf_cluster.util.slow_disk import DiskDeadline
from rlhf_cluster.util.waiting import gather_or_cancel
from rlhf_cluster.weights.writer_fence import Writer

log = logging.getLogger(__name__)


class RayScoring:
    """`ScoringPort` that calls the pools of `ScoringWorker` actors, and owns their common reference.

    With several pools, all score their part of a group concurrently, and a worker of `[scoring]` merges
    the parts. The group fails once, with the error of the first part to fail. `writer` is the attempt
    that moves the reference. It is set before the first `follow` of an attempt.
    """

    def __init__(
        self,
        pools: Mapping[str, WorkerPool],
        config: RunConfig,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pools = dict(pools)
        self._config = config.scoring
        self._abandoned = {name: Abandoned(pool) for name, pool in pools.items()}
        self._asked = [name for name in pools if len(pools) == 1 or self._config.served_by(name)]
        self._busy = {name: Occupancy(clock, _live(pool)) for name, pool in pools.items()}
        self._bring_timeout_s = config.pull_deadline_s
        self._load_timeout_s = config.run.start_timeout_s
        self._patience = DiskDeadline(
            limit_s=config.run.start_timeout_s, setting="run.start_timeout_s"
        )
        self._score_timeout_s = score_deadline_s(config.scoring, config.buffer)
        self._keeper = (
            ReferenceKeeper(
                config.run_dir / "reference",
                config.scoring.reference_update,
                fence=config.weights_dir,
            )
            if config.stored_reference
            else None
        )
        self._reference = PoolVersion(
            self._serving(REFERENCE), self._load, "the reference of version"
        )
        self._exact = PoolVersion(
            self._serving(EXACT), self._bring, "for exact log-probabilities, version"
        )
        self._num_retries = 0
        self.writer: Writer | None = None

    async def score(self, group: Handle) -> tuple[Handle, GroupSummary]:
        """Score one group. Returns the handle of its record, and its summary.

        Waits for: the parts of all pools, then for their merge. Each call has a deadline.
        """
        if len(self._pools) == 1:
            given = await self._ask(SCORING, "score", group)
            return given.handle, given.summary
        parts = await gather_or_cancel(self._ask(name, "score_part", group) for name in self._asked)
        given = await self._ask(SCORING, "join", group, *(part.handle for part in parts))
        return given.handle, given.summary

    def take_busy(self) -> Mapping[str, float]:
        """Return the seconds since the last call for which each pool was busy.

        With a single pool it returns {}, because the caller measures the same.
        """
        spent = {name: busy.take().busy_s for name, busy in self._busy.items()}
        return spent if len(spent) > 1 else {}

    async def follow(self, version: WeightVersion) -> None:
        """Load the policy's `version` for exact log-probabilities, and move the reference if it is due.

        Every generation worker runs `version` already. Workers load version and reference with the
        promises of `PoolVersion.move`.

        Raises:
            WeightError: also for a reference that is not written in time. The call may be repeated with
                the same version.
            StalledError.
        Waits for: every live worker that scores with `version` to have it; then the new reference to be
        written, and to be loaded by every live worker that has one.
        """
        if self._config.exact_logprobs and version != self._exact.target:
            try:
                await self._exact.move(version)
            except (
                WeightError
            ) as error:  # each worker continues to read, and its groups wait for that
                log.warning("%s", error)
        if self._keeper is None:
            return
        try:
            target = await self._patience.aside(
                f"the reference of version {version.version}",
                self._keeper.follow,
                version,
                self.writer,
            )
        except StalledError as error:
            raise WeightError(str(error)) from error
        if target != self._reference.target:
            await self._reference.move(target)

    async def begin_anew(self) -> None:
        """Forget all versions after the learner went back to a checkpoint.

        Other weights will be published with version numbers that were used before. A worker that fails
        to forget its versions is replaced.

        Waits for: cancelled groups, then for every live worker to forget the weights that it keeps by
        version number.
        """
        await asyncio.gather(*(calls.end() for calls in self._abandoned.values()))
        self._exact.target = None
        if self._config.exact_logprobs:
            pool = self._serving(EXACT)
            workers = [w for w in pool.workers if w.state in (State.LIVE, State.BEHIND)]
            await asyncio.gather(*(self._forget_or_fail(w) for w in workers))

    async def join(self, pool: str, worker: Worker) -> None:
        """Load the reference and the policy's version on a new worker, before it gets work.

        Only the pools that use them load them; see `PoolVersion.join`.
        """
        if self._config.pool_of(REFERENCE) == pool:
            await self._reference.join(worker)
        if self._config.exact_logprobs and self._config.pool_of(EXACT) == pool:
            await self._exact.join(worker)

    def metrics(self) -> Mapping[str, float]:
        """Return the number of retries, and the version of the reference if one is configured."""
        found = {"scoring/retries_total": float(self._num_retries)}
        if self._config.reference:
            found["scoring/reference_version"] = float(self.reference_version() or 0)
        return found

    def reference_version(self) -> int | None:
        """Return the version of the reference that the workers have; None before the first one."""
        target = self._reference.target
        return None if target is None else target.version

    async def _ask(self, pool: str, method: str, *arguments: Handle) -> Answered:
        with self._busy[pool].call():
            return await try_workers(
                self._pools[pool],
                self._abandoned[pool],
                lambda w: getattr(w.actor, method).options(num_returns=2).remote(*arguments),
                method,
                self._score_timeout_s,
                self._config.max_retries,
                self._count_retry,
            )

    def _serving(self, model: str) -> WorkerPool:
        return self._pools[self._config.pool_of(model)]

    def _count_retry(self) -> None:
        self._num_retries += 1

    async def _forget_or_fail(self, worker: Worker) -> None:
        asked = worker.actor.forget_versions.remote()
        try:
            await answer(asked, self._config.request_timeout_s, f"{worker.name}.forget_versions")
        except (WorkerError, StalledError) as error:
            await self._serving(EXACT).fail(worker, error)

    async def _bring(self, worker: Worker, version: WeightVersion) -> None:
        await answer(
            worker.actor.bring_version.remote(version),
            self._bring_timeout_s(version.num_bytes),
            f"{worker.name}.bring_version(version {version.version})",
        )

    async def _load(self, worker: Worker, reference: WeightVersion) -> None:
        await answer(
            worker.actor.load_reference.remote(reference),
            self._load_timeout_s,
            f"{worker.name}.load_reference(version {reference.version})",
        )


def score_deadline_s(scoring: Scoring, buffer: Buffer) -> float:
    """Return the seconds for scoring one group and storing it."""
    return scoring.request_timeout_s + buffer.write_timeout_s


def _live(pool: WorkerPool) -> Callable[[], int]:
    return lambda: pool.num_live
