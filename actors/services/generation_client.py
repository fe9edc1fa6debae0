"""Generation port over a pool of actors, and the retries that the clients of all pools use.

- If a worker dies or hangs, its group is tried on another worker, at most `max_retries` times.
  Random streams do not depend on the worker, so the new attempt draws the same tokens.
- With `generation.segment_tokens` the unit of a retry is one segment, after the tokens so far. The
  next segment goes to the worker that has the caches of the group, while that worker lives.
- Records stay in the object store. Each call returns (small summary, record) as two references, and
  only the summary is fetched here.
- A call that was cancelled is kept as `Abandoned` while its worker may still compute it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import ray

from actors.cluster.calls import answer
from rlhf_cluster.errors import (
    RecordLost,
    RlhfError,
    WeightError,
    WorkerDied,
    WorkerError,
    WorkerSilent,
)
from rlhf_cluster.failures import (
    is_group_failure,
    is_retryable,
)
from rlhf_cluster.generation.worker_quarantine import Watch
from rlhf_cluster.records import (
    Handle,
    PartialGroup,
    Prompt,
    Sampling,
    Ticket,
    WeightVersion,
)
from rlhf_cluster.run.pool_version import PoolVersion
from rlhf_cluster.run.worker_pool import (
    State,
    Worker,
    WorkerPool,
)
from rlhf_cluster.sections.rl_run import Generation


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    worker: Worker
    reference: Any
    future: Future[Any]
    ends: float  # time of the call's own deadline, on the clock of `Abandoned`

    @property
    def is_open(self) -> bool:
        return not self.future.done() and self.worker.state is not State.RETIRED


class Abandoned:
    """Cancelled calls that workers may still be computing.

    A call of an actor with threads cannot be cancelled once it runs. Its worker is healthy, and busy
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
        """Number of calls that are not known to have ended."""
        return len(self._calls)

    def add(self, worker: Worker, reference: Any, ends: float) -> None:
        """Cancel a call and remember it.

        A call that waits in the worker does not begin, and an engine aborts its requests. Any other
        call ends before `ends`.
        """
        self._cancel(reference)
        self._calls = [call for call in self._calls if call.is_open]
        future = reference.future()
        self._calls.append(_Call(worker=worker, reference=reference, future=future, ends=ends))

    async def end(self) -> None:
        """Let every remembered call end, and forget them.

        A worker that still computes a call after the call's own deadline is replaced.

        Waits for: each call, until its deadline.
        """
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
            pass  # an error also means that the call has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """Answer of `worker`, with the number of tries that failed before it."""

    summary: Any
    handle: Handle
    worker: Worker
    num_failed: int


async def try_workers(
    pool: WorkerPool,
    abandoned: Abandoned,
    call: Callable[[Worker], tuple[Any, Handle]],
    what: str,
    timeout_s: float,
    max_retries: int,
    retried: Callable[[], None],
    prefer: Worker | None = None,
    faulted: Callable[[Worker], Awaitable[None]] | None = None,
) -> Answered:
    """Try one worker after another, and return the first answer; else raise the last try's error.

    - A worker that died or was silent is replaced.
    - A worker that answered with an error that another worker may not see (`rlhf_cluster.failures` has
      the table) is checked. It stays in the pool if it can still serve, and `faulted` is called.
    - Other errors are raised at once. A lost record is one of these, as no worker caused it.

    Args:
        call: starts the call on a worker; returns the references of summary and record.
        retried: called before each further try.
        prefer: worker of the first try, if it is free.
    """
    last: RlhfError | None = None
    tried: list[Worker] = []
    for num_failed in range(max_retries + 1):
        if num_failed:
            retried()
        async with pool.acquire(prefer if num_failed == 0 else None, tried) as worker:
            tried.append(worker)
            reference, handle = call(worker)
            ends = time.monotonic() + timeout_s
            try:
                summary = await answer(reference, timeout_s, f"{worker.name}.{what}")
                return Answered(
                    summary=summary, handle=handle, worker=worker, num_failed=num_failed
                )
            except asyncio.CancelledError:
                abandoned.add(worker, reference, ends)
                raise
            except RecordLost:
                raise
            except (WorkerDied, WorkerSilent) as error:
                last = error
                await pool.fail(worker, error)
            except RlhfError as error:
                if not is_retryable(error):
                    raise
                last = error
                await pool.suspect(worker, error)
                if faulted is not None:
                    await faulted(worker)
    assert last is not None
    raise last if is_group_failure(last) else WorkerError(str(last))


class RayGeneration:
    """`GenerationPort` that calls a pool of `GenerationWorker` actors.

    A worker that fails repeatedly, or is far slower than the others, is put into quarantine.
    """

    def __init__(
        self, pool: WorkerPool, section: Generation, pull_deadline_s: Callable[[int], float]
    ) -> None:
        """`pull_deadline_s`: returns the deadline, in seconds, to load a version of that many bytes."""
        self._pool = pool
        self._config = section
        self._pull_deadline_s = pull_deadline_s
        self._abandoned = Abandoned(pool)
        names = ("segments", "segments_queued", "tokens_kept", "tokens_resampled", "retries")
        self._totals = dict.fromkeys(names, 0)
        self._watch = Watch(section.quarantine)
        self._seen_changes = -1  # `changes` of the pool when the watch was last updated
        self._version = PoolVersion(pool, self._pull_one)

    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        start: PartialGroup | None = None,
    ) -> Handle:
        """Generate segments until every response is finished, continuing those of `start` if given.

        Each segment may be retried `max_retries` times. Tokens so far that were lost with a node are
        sampled again, at most `max_retries` times.
        """
        partial: Handle | PartialGroup | None = start
        worker: Worker | None = None
        num_tokens, num_losses = 0, 0
        while True:
            try:
                given = await self._segment(ticket, prompt, sampling, partial, worker)
            except RecordLost:
                num_losses += 1
                if num_losses > self._config.max_retries:
                    raise
                self._totals["tokens_resampled"] += num_tokens
                partial, num_tokens = start, 0
                continue
            added = given.summary["num_tokens"]
            self._totals["segments"] += 1
            self._totals["segments_queued"] += given.summary["queued"]
            self._totals["tokens_kept"] += given.num_failed * num_tokens
            self._totals["tokens_resampled"] += given.num_failed * added
            if not given.summary["num_unfinished"]:
                return given.handle
            partial, worker, num_tokens = given.handle, given.worker, num_tokens + added

    async def _segment(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        partial: Handle | PartialGroup | None,
        prefer: Worker | None,
    ) -> Answered:
        arguments = (ticket, prompt, sampling, partial)
        given = await try_workers(
            self._pool,
            self._abandoned,
            lambda w: w.actor.generate.options(num_returns=2).remote(*arguments),
            f"generate({ticket.group_id})",
            self._config.request_timeout_s,
            self._config.max_retries,
            self._count_retry,
            prefer,
            lambda w: self._record_fault(w, ticket.group_id),
        )
        name, took = given.worker.name, given.summary
        reason = self._watching().served(name, took["generate_s"], took["num_tokens"])
        if reason is not None:
            self._watch.forget(name)
            await self._pool.quarantine(given.worker, reason)
        return given

    def _count_retry(self) -> None:
        self._totals["retries"] += 1

    async def _record_fault(self, worker: Worker, group_id: str) -> None:
        reason = self._watching().fault(worker.name, group_id, time.monotonic())
        if reason is not None:
            self._watch.forget(worker.name)
            await self._pool.quarantine(worker, reason, needed=True)

    def _watching(self) -> Watch:
        """Return the watch, updated with the workers that are live."""
        if self._pool.changes != self._seen_changes:
            self._seen_changes = self._pool.changes
            self._watch.forget_all_but([worker.name for worker in self._pool.workers])
            self._watch.present([worker.name for worker in self._pool.live])
        return self._watch

    def metrics(self) -> Mapping[str, float]:
        """Return totals since the start.

        These are: segments, segments at whose end requests waited, tries after the first, and the
        tokens that were kept or sampled again after failed calls.
        """
        return {f"generation/{name}_total": float(n) for name, n in self._totals.items()}

    @property
    def target(self) -> WeightVersion | None:
        """Version that every worker in service runs; None until the first one."""
        return self._version.target

    async def pull(self, version: WeightVersion) -> None:
        """Make `version` live with the promises of `PoolVersion.move`.

        After it no worker samples with older weights.
        """
        await self._version.move(version)

    async def join(self, worker: Worker) -> None:
        """Bring a new worker to the newest version before it gets work (`PoolVersion.join`)."""
        await self._version.join(worker)

    async def begin_anew(self) -> None:
        """Forget the live version after the learner went back to a checkpoint.

        The learner will publish the version that workers run next, whatever they run now. Nothing may
        be generated until then. A worker joins like before the first version.

        Waits for: cancelled groups to end in the engines.
        """
        self._version.target = None
        await self._abandoned.end()

    async def _pull_one(self, worker: Worker, version: WeightVersion) -> None:
        loaded = await answer(
            worker.actor.pull.remote(version),
            self._pull_deadline_s(version.num_bytes),
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


async def check_health(worker: Worker, timeout_s: float) -> None:
    """Raise a `WorkerError` if the worker does not answer, or answers that it cannot serve."""
    await answer(worker.actor.health.remote(), timeout_s, f"{worker.name}.health")
