"""Publishing behind the next step.

    step k done -> snapshot (the learner waits for this copy only)
                     -> write -> every worker pulls -> the version is live      (beside step k+1)

Promises:
- at most one publish runs at a time; if one still runs when the next is due, the due one is skipped
  and counted, and the newest weights are published as soon as the running one is live;
- so the newest due version always becomes live in the end, and nobody waits for ever for it;
- a failure in the background is raised at the next call, and by `run_until_cancelled` at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from rlhf_cluster.errors import StalledError
from rlhf_cluster.ports import BufferPort, GenerationPort, LearnerPort
from rlhf_cluster.records import WeightVersion


@dataclass(slots=True, kw_only=True)
class SyncStats:
    """What publishing has cost so far. Times are those of the last publish, in seconds."""

    published: int = -1
    live: int = -1
    skipped: int = 0
    snapshot_s: float = 0.0
    publish_s: float = 0.0
    pull_s: float = 0.0
    num_bytes: int = 0


class WeightSync:
    """Owns the way of a version from the learner to the generation pool."""

    def __init__(
        self,
        learner: LearnerPort,
        generation: GenerationPort,
        buffer: BufferPort,
        publish_every: int,
        clock: Callable[[], float],
    ) -> None:
        self._learner = learner
        self._generation = generation
        self._buffer = buffer
        self._publish_every = publish_every
        self._clock = clock
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

    async def run_until_cancelled(self, check_every_s: float) -> None:
        """Raise a background failure as soon as it happens. Unblocked by: cancellation."""
        while True:
            await asyncio.sleep(check_every_s)
            self._raise_failure()

    async def _publish_until_current(self, snapshot: int) -> None:
        while True:
            await self._publish(snapshot)
            if self._due <= snapshot:
                return
            snapshot = await self._snapshot()

    async def _snapshot(self) -> int:
        start = self._clock()
        version = await self._learner.snapshot()
        self.stats.snapshot_s = self._clock() - start
        return version

    async def _publish(self, snapshot: int) -> None:
        start = self._clock()
        version = await self._learner.publish()
        self.last = version
        self.stats.published, self.stats.num_bytes = version.version, version.num_bytes
        written = self._clock()
        await self._generation.pull(version)
        await self._buffer.version_live(version.version)
        self.stats.live = version.version
        self.stats.publish_s, self.stats.pull_s = written - start, self._clock() - written

    def _raise_failure(self) -> None:
        if self._running is not None and self._running.done():
            task, self._running = self._running, None
            task.result()
