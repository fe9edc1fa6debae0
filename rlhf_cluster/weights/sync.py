"""Publishing behind the next step.

    step k done -> snapshot (the learner waits for this copy only)
                     -> write -> every worker pulls -> the version is live      (beside step k+1)
                                                    -> a moving reference follows

Promises:
- at most one publish runs at a time; if one still runs when the next is due, the due one is skipped
  and counted, and the newest weights are published as soon as the running one is live;
- so the newest due version always becomes live in the end, and nobody waits for ever for it;
- groups that are admitted because a version went live are scored with the reference that follows
  from it, because the reference moves first;
- a version that the readers refuse (its shards are damaged or lost, or the storage is too slow) is no
  worker's fault: all go on with the weights they have, the learner is told why, and the newest weights
  are published in its place after a pause; so are they after a publish that failed. The
  `MAX_REFUSED`-th of these in a row is a failure;
- a reference that its readers refuse is no worker's fault either: the version waits for it, and is
  live only with it;
- a version is live only after `GenerationPort.pull` returned;
- a failure in the background is raised at the next call, and by `run_until_cancelled` at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.ports import BufferPort, GenerationPort, LearnerPort
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.deadlines import reply_deadline

MAX_REFUSED = 3
PAUSE_S = 1.0
"""Before the second try; longer before the next."""


@dataclass(slots=True, kw_only=True)
class SyncStats:
    """What publishing has cost so far. Times are those of the last publish, in seconds."""

    published: int = -1
    live: int = -1
    skipped: int = 0
    refused: int = 0
    snapshot_s: float = 0.0
    publish_s: float = 0.0
    pull_s: float = 0.0
    num_bytes: int = 0
    stored_bytes: int = 0


async def _nothing_follows(version: WeightVersion) -> None:
    return None


class WeightSync:
    """Owns the way of a version from the learner to the generation pool.

    `pulled` is called with each version that every generation worker has, before it counts as live.
    """

    def __init__(
        self,
        learner: LearnerPort,
        generation: GenerationPort,
        buffer: BufferPort,
        publish_every: int,
        clock: Callable[[], float],
        pulled: Callable[[WeightVersion], Awaitable[None]] = _nothing_follows,
        pause_s: float = PAUSE_S,
    ) -> None:
        """`pause_s`: after a version that was refused or not published; twice that after the next."""
        self._learner = learner
        self._generation = generation
        self._buffer = buffer
        self._publish_every = publish_every
        self._clock = clock
        self._pulled = pulled
        self._pause_s = pause_s
        self._running: asyncio.Task[None] | None = None
        self._due = -1
        self.stats = SyncStats()
        self.last: WeightVersion | None = None

    async def after_step(self, version: int) -> None:
        """Call between steps. Waits for: the copy out of the learner, no more."""
        if version % self._publish_every:
            return
        self._due = version
        if self._running is not None and not self._running.done():
            self.stats.skipped += 1
            return
        self._raise_failure()
        snapshot = await self._snapshot()
        self._running = asyncio.create_task(self._publish_until_current(snapshot))

    async def publish_last(self, version: int, timeout_s: float) -> None:
        """Make `version`, the learner's current one, live unless it is. For the end of a run."""
        await self.drain(timeout_s)
        if self.stats.live < version:
            self._due = version
            self._running = asyncio.create_task(self._publish_until_current(await self._snapshot()))
            await self.drain(timeout_s)

    async def drain(self, timeout_s: float) -> None:
        """Waits for: the newest due version to be live. Unblocked by: the publish under way."""
        if self._running is None:
            return
        done, _ = await asyncio.wait({self._running}, timeout=timeout_s)
        if not done:
            raise StalledError(
                f"version {self._due} was not live after {timeout_s:g} s; published "
                f"{self.stats.published}, live {self.stats.live}"
            )
        self._raise_failure()

    async def abandon(self, timeout_s: float) -> None:
        """The learner is gone: see the publish under way end, and forget what came of it.

        Waits for: its end. Unblocked by: its calls to the learner, which fail now; a pull's deadline.
        """
        running, self._running = self._running, None
        if running is None:
            return
        done, _ = await asyncio.wait({running}, timeout=timeout_s)
        if not done:
            running.cancel()
            raise StalledError(
                f"the publish of version {self._due}, whose learner is gone, still ran after "
                f"{timeout_s:g} s"
            )
        if not running.cancelled():
            running.exception()

    async def run_until_cancelled(self, check_every_s: float) -> None:
        """Raise a background failure as soon as it happens. Unblocked by: cancellation."""
        while True:
            await asyncio.sleep(check_every_s)
            self._raise_failure()

    async def _publish_until_current(self, snapshot: int) -> None:
        num_refused = 0
        while True:
            refusal = await self._publish(snapshot)
            num_refused = 0 if refusal is None else num_refused + 1
            if refusal is not None and num_refused >= MAX_REFUSED:
                raise refusal
            if refusal is None and self._due <= snapshot:
                return
            if refusal is not None:
                await asyncio.sleep(self._pause_s * num_refused)
            snapshot = await self._snapshot()

    async def _snapshot(self) -> int:
        start = self._clock()
        version = await self._learner.snapshot()
        self.stats.snapshot_s = self._clock() - start
        return version

    async def _publish(self, snapshot: int) -> WeightError | None:
        """None when the version is live; why not, when it was not published or the readers refused it.

        Waits for: the write, and the readers; each has its deadline.
        """
        start = self._clock()
        try:
            version = await self._learner.publish()
        except WeightError as failure:
            self.stats.refused += 1
            return failure
        self.last = version
        self.stats.published, self.stats.num_bytes = version.version, version.num_bytes
        self.stats.stored_bytes = version.stored_bytes
        written = self._clock()
        try:
            await self._generation.pull(version)
        except WeightError as refusal:
            self.stats.refused += 1
            await self._learner.refused(version.version, str(refusal))
            return refusal
        await self._follow(version)
        await self._buffer.version_live(version.version)
        self.stats.live = version.version
        self.stats.publish_s, self.stats.pull_s = written - start, self._clock() - written
        return None

    async def _follow(self, version: WeightVersion) -> None:
        """What follows from `version`, which every reader has: tried again, after a pause, where its
        storage is slow. Raises the `MAX_REFUSED`-th `WeightError`."""
        for num_tries in range(1, MAX_REFUSED + 1):
            try:
                return await self._pulled(version)
            except WeightError:
                self.stats.refused += 1
                if num_tries == MAX_REFUSED:
                    raise
            await asyncio.sleep(self._pause_s * num_tries)

    def _raise_failure(self) -> None:
        if self._running is not None and self._running.done():
            task, self._running = self._running, None
            task.result()


def live_deadline_s(
    *,
    snapshot_s: float,
    publish_s: float,
    heartbeat_s: float,
    pull_s: float,
    reference_s: float | None,
    exact_s: float | None,
) -> float:
    """Seconds that all tries of `WeightSync` to make a version live may take.

    One try consists of a snapshot, a publish, a pull with `heartbeat_s` for a look at the workers that
    did not answer, and, where a reference moves with the policy, its own writes and loads of
    `reference_s` each, and where exact log-probabilities are scored, a load of `exact_s` there.
    """
    moved_s = 2 * reply_deadline(heartbeat_s)  # each asks twice, and looks after who did not answer
    committed_s = reply_deadline(publish_s, 0.0) + reply_deadline(0.0)
    pulled_s = moved_s + 2 * reply_deadline(pull_s)
    followed_s = 0.0
    if reference_s is not None:  # written once a try, then loaded
        followed_s = MAX_REFUSED * (reference_s + moved_s + 2 * reply_deadline(reference_s))
    if exact_s is not None:  # brought to the pool of exact log-probabilities
        followed_s += MAX_REFUSED * (moved_s + 2 * reply_deadline(exact_s))
    pauses_s = 2 * PAUSE_S * MAX_REFUSED
    return reply_deadline(
        MAX_REFUSED * (reply_deadline(snapshot_s) + committed_s + pulled_s + followed_s + pauses_s)
    )


class BasePlan:
    """Which version the next one builds on. An anchor, stored in full, comes first, after every
    publish that failed, and at least every `anchor_every` versions, each of which builds on the one
    before. With None all build on the anchor itself."""

    def __init__(self, anchor_every: int | None) -> None:
        self._anchor_every = anchor_every
        self._taken: int | None = None
        self._newest: int | None = None
        self._length = 0

    def take_base(self) -> int | None:
        """The base of the version about to be written; None for an anchor.

        Until `committed` says that it is in the store, the version counts as failed.
        """
        base, self._newest = self._newest, None
        if self._anchor_every is not None and self._length >= self._anchor_every:
            base = None
        if base is None:
            self._length = 0
        self._taken = base
        return base

    def committed(self, version: int) -> None:
        stays = self._anchor_every is None and self._taken is not None
        self._newest = self._taken if stays else version
        self._length += 1
