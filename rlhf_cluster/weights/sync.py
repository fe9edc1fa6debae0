"""Publish the learner's weights to the generation workers while the next step runs.

    step k done -> snapshot (the learner waits for this copy only)
                     -> write -> every worker pulls -> the version is live      (during step k+1)
                                                    -> a moving reference follows

Promises:
- At most one publish runs at a time. If one still runs when the next is due, the due one is skipped
  and counted. The newest weights are published as soon as the running publish is live.
- So the newest due version always becomes live in the end, and every wait for it ends.
- A moving reference moves before its version is live. So groups that are admitted because a version
  went live are scored with the reference of that version.
- If the readers refuse a version (its shards are damaged or lost, or the storage is too slow), no
  worker is blamed. The workers keep serving the weights they have, the learner logs the reason, and
  the newest weights are published after a pause. A failed publish is handled the same way.
  `MAX_REFUSED` consecutive failures of these kinds end the run. The pauses between them outlast a
  storage that answers nothing but errors for half a minute.
- If its readers refuse a reference, no worker is blamed either. The version waits for the reference,
  and is live only with it.
- A version is live only after `GenerationPort.pull` returned.
- A failure in the background is raised at the next call, and by `run_until_cancelled` at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.ports import BufferPort, GenerationPort, LearnerPort
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.waiting import reply_deadline

PAUSES_S = (5.0, 30.0)
"""Seconds of pause before the second and the third try."""
MAX_REFUSED = 1 + len(PAUSES_S)


@dataclass(slots=True, kw_only=True)
class SyncStats:
    """Counts and costs of publishing so far. Times are those of the last publish, in seconds."""

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


async def _nobody_waits(version: int) -> None:
    return None


class WeightSync:
    """The way of a version from the learner to the generation pool.

    `pulled` is called with each version that every generation worker has, before the version is
    live. `make_way` is awaited before the workers are asked to take a version, and `went_live` is
    called when one is live.
    """

    def __init__(
        self,
        learner: LearnerPort,
        generation: GenerationPort,
        buffer: BufferPort,
        publish_every: int,
        clock: Callable[[], float],
        pulled: Callable[[WeightVersion], Awaitable[None]] = _nothing_follows,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        make_way: Callable[[int], Awaitable[None]] = _nobody_waits,
        went_live: Callable[[int], None] = lambda version: None,
    ) -> None:
        """Start with no version published."""
        self._learner = learner
        self._generation = generation
        self._buffer = buffer
        self._publish_every = publish_every
        self._clock = clock
        self._pulled = pulled
        self._sleep = sleep
        self._make_way = make_way
        self._went_live = went_live
        self._is_abandoned = False
        self._is_paused = False
        self._running: asyncio.Task[None] | None = None
        self._due = -1
        self.stats = SyncStats()
        self.last: WeightVersion | None = None

    async def after_step(self, version: int) -> None:
        """Start the publish of `version` if it is due. Call between steps.

        Waits for: the copy out of the learner, nothing else.
        """
        if version % self._publish_every:
            return
        # A publish in progress compares with it at its end, so a skipped version is not forgotten.
        self._due = version
        if self._running is not None and not self._running.done():
            self.stats.skipped += 1
            return
        self._raise_failure()
        snapshot = await self._snapshot()
        self._start(snapshot)

    async def publish_last(self, version: int, timeout_s: float) -> None:
        """Make `version`, the learner's current one, live unless it is live. For the end of a run."""
        await self.drain(timeout_s)
        if self.stats.live < version:
            self._due = version
            self._start(await self._snapshot())
            await self.drain(timeout_s)

    def _start(self, snapshot: int) -> None:
        self._running = asyncio.create_task(self._publish_until_current(snapshot))
        # A run that ends for another reason never asks how this ended, and nothing is to be logged.
        self._running.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def drain(self, timeout_s: float) -> None:
        """Wait until the newest due version is live. Raises `StalledError` after `timeout_s`.

        Waits for: the publish in progress. Unblocked by: its end.
        """
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
        """Wait for the end of the publish whose learner is dead, and discard its outcome.

        A pause between two tries is cut short, and no other begins.

        Waits for: the publish in progress. Unblocked by: its calls to the learner, which fail because
        the learner is dead; a pull's deadline. Raises `StalledError` after `timeout_s`.
        """
        running, self._running = self._running, None
        if running is None:
            return
        self._is_abandoned = True
        if self._is_paused:
            running.cancel()
        done, _ = await asyncio.wait({running}, timeout=timeout_s)
        if not done:
            running.cancel()
            raise StalledError(
                f"the publish of version {self._due}, whose learner is dead, still ran after "
                f"{timeout_s:g} s"
            )
        # asyncio logs an exception that is not retrieved.
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
                await self._pause(num_refused)
            snapshot = await self._snapshot()

    async def _snapshot(self) -> int:
        start = self._clock()
        version = await self._learner.snapshot()
        self.stats.snapshot_s = self._clock() - start
        return version

    async def _publish(self, snapshot: int) -> WeightError | None:
        """Write `snapshot` and make it live. Return None, or the error that kept it from being live.

        Such an error means that the version was not published, or that the readers refused it.
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
        await self._make_way(version.version)
        begun = self._clock()
        try:
            await self._generation.pull(version)
        except WeightError as refusal:
            self.stats.refused += 1
            await self._learner.refused(version.version, str(refusal))
            return refusal
        await self._follow(version)
        await self._buffer.set_live_version(version.version)
        self.stats.live = version.version
        self.stats.publish_s, self.stats.pull_s = written - start, self._clock() - begun
        self._went_live(version.version)
        return None

    async def _follow(self, version: WeightVersion) -> None:
        """Call `pulled` with `version`, which every reader has; after a `WeightError`, try again.

        A slow storage is such an error. Each further try comes after a pause. Raises the
        `MAX_REFUSED`-th `WeightError`.
        """
        for num_tries in range(1, MAX_REFUSED + 1):
            try:
                return await self._pulled(version)
            except WeightError:
                self.stats.refused += 1
                if num_tries == MAX_REFUSED:
                    raise
            await self._pause(num_tries)

    async def _pause(self, num_failed: int) -> None:
        """Wait before the try that follows `num_failed` failed ones."""
        if self._is_abandoned:
            raise asyncio.CancelledError
        self._is_paused = True
        try:
            await self._sleep(PAUSES_S[num_failed - 1])
        finally:
            self._is_paused = False

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

    One try consists of:
    - a snapshot, a publish, and a pull with `heartbeat_s` to check the workers that did not answer;
    - where a reference moves with the policy, its writes and loads of `reference_s` each;
    - where exact log-probabilities are scored, a load of `exact_s` there.
    """
    # Each asks twice, and checks the workers that did not answer.
    moved_s = 2 * reply_deadline(heartbeat_s)
    committed_s = reply_deadline(publish_s, 0.0) + reply_deadline(0.0)
    pulled_s = moved_s + 2 * reply_deadline(pull_s)
    followed_s = 0.0
    if reference_s is not None:  # written once per try, then loaded
        followed_s = MAX_REFUSED * (reference_s + moved_s + 2 * reply_deadline(reference_s))
    if exact_s is not None:  # loaded by the pool of exact log-probabilities
        followed_s += MAX_REFUSED * (moved_s + 2 * reply_deadline(exact_s))
    pauses_s = 2 * sum(PAUSES_S)  # of the publishes, and of the moves of the reference in each
    return reply_deadline(
        MAX_REFUSED * (reply_deadline(snapshot_s) + committed_s + pulled_s + followed_s + pauses_s)
    )


class BasePlan:
    """Schedule of anchors: decides which version the next one builds on.

    An anchor is stored as a full snapshot. The first version is one, the version after every publish
    that failed, and at least every `anchor_every`-th. Each other version builds on the one before
    it. With `anchor_every` None, all build on the anchor itself.
    """

    def __init__(self, anchor_every: int | None) -> None:
        self._anchor_every = anchor_every
        self._taken: int | None = None
        self._newest: int | None = None
        self._length = 0

    def take_base(self) -> int | None:
        """Return the base of the version about to be written; None for an anchor.

        Until `committed` reports that the version is in the store, it is treated as failed.
        """
        base, self._newest = self._newest, None
        if self._anchor_every is not None and self._length >= self._anchor_every:
            base = None
        if base is None:
            self._length = 0
        self._taken = base
        return base

    def committed(self, version: int) -> None:
        """Record that `version`, the one of the last `take_base`, is in the store."""
        stays = self._anchor_every is None and self._taken is not None
        self._newest = self._taken if stays else version
        self._length += 1
