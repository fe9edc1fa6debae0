"""The generation and scoring ports over pools of actors.

A group whose worker dies or hangs is tried again on another worker, at most `max_retries` times;
its request seed depends on the group alone, so the new attempt draws what the old one would have.
The records stay in the object store: each call returns (small summary, record) as two references,
and only the first is fetched here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from actors.calls import WorkerDied, WorkerSilent, answer
from actors.pool import Worker, WorkerPool
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import (
    RlhfError,
    ScoringError,
    StalledError,
    WeightError,
    WorkerError,
)
from rlhf_cluster.ports import Handle
from rlhf_cluster.records import GroupSummary, Prompt, Sampling, Ticket, WeightVersion


async def _try_workers(
    pool: WorkerPool,
    call: Callable[[Worker], tuple[Any, Handle]],
    what: str,
    timeout_s: float,
    max_retries: int,
) -> tuple[Any, Handle]:
    """The answer of the first worker that gives one; the last try's error otherwise.

    A worker that died or was silent is replaced. One that answered with an error is checked first:
    it stays when it can still serve.
    """
    last: RlhfError | None = None
    for _ in range(max_retries + 1):
        async with pool.acquire() as worker:
            try:
                summary, handle = call(worker)
                return await answer(summary, timeout_s, f"{worker.name}.{what}"), handle
            except (WorkerDied, WorkerSilent) as error:
                last = error
                await pool.fail(worker, error)
            except (WorkerError, ScoringError, StalledError) as error:
                last = error
                await pool.suspect(worker, error)
    assert last is not None
    raise last if isinstance(last, (WorkerError, ScoringError)) else WorkerError(str(last))


class RayGeneration:
    """`GenerationPort` over a pool of `GenerationWorker` actors."""

    def __init__(self, pool: WorkerPool, config: RunConfig) -> None:
        self._pool = pool
        self._config = config.generation
        self.target: WeightVersion | None = None

    async def generate(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> Handle:
        _, handle = await _try_workers(
            self._pool,
            lambda w: w.actor.generate.options(num_returns=2).remote(ticket, prompt, sampling),
            f"generate({ticket.group_id})",
            self._config.request_timeout_s,
            self._config.max_retries,
        )
        return handle

    async def pull(self, version: WeightVersion) -> None:
        """Waits for: every live worker. One that fails is replaced by one that runs `version`."""
        self.target = version
        await asyncio.gather(*(self._pull_or_fail(w, version) for w in self._pool.live))

    async def join(self, worker: Worker) -> None:
        """Bring a new worker to the newest version before it gets work."""
        while (target := self.target) is not None:
            await self._pull_one(worker, target)
            if self.target is target:
                return

    async def _pull_or_fail(self, worker: Worker, version: WeightVersion) -> None:
        try:
            await self._pull_one(worker, version)
        except (WeightError, WorkerError, StalledError) as error:
            await self._pool.fail(worker, error)

    async def _pull_one(self, worker: Worker, version: WeightVersion) -> None:
        loaded = await answer(
            worker.actor.pull.remote(version),
            self._config.pull_timeout_s,
            f"{worker.name}.pull(version {version.version})",
        )
        if (loaded.version, loaded.digest, loaded.num_tensors) != (
            version.version,
            version.digest,
            version.num_tensors,
        ):
            raise WeightError(
                f"{worker.name} runs version {loaded.version} ({loaded.num_tensors} tensors, "
                f"digest {loaded.digest}) after pulling version {version.version} "
                f"({version.num_tensors} tensors, digest {version.digest})"
            )


class RayScoring:
    """`ScoringPort` over a pool of `ScoringWorker` actors."""

    def __init__(self, pool: WorkerPool, config: RunConfig) -> None:
        self._pool = pool
        self._config = config.scoring
        self._start_timeout_s = config.run.start_timeout_s
        self.reference_dir: str | None = None

    async def use_reference(self, folder: str) -> None:
        """Waits for: every live worker to load the reference model in `folder`."""
        self.reference_dir = folder
        await asyncio.gather(*(self.join(worker) for worker in self._pool.live))

    async def join(self, worker: Worker) -> None:
        """Give a new worker the reference before it gets work."""
        if self.reference_dir is not None:
            await answer(
                worker.actor.load_reference.remote(self.reference_dir),
                self._start_timeout_s,
                f"{worker.name}.load_reference",
            )

    async def score(self, group: Handle) -> tuple[Handle, GroupSummary]:
        summary, handle = await _try_workers(
            self._pool,
            lambda w: w.actor.score.options(num_returns=2).remote(group),
            "score",
            self._config.request_timeout_s,
            self._config.max_retries,
        )
        return handle, summary


async def check_health(worker: Worker, timeout_s: float) -> None:
    """Raise a `WorkerError` when the worker does not answer, or answers that it cannot serve."""
    await answer(worker.actor.health.remote(), timeout_s, f"{worker.name}.health")
