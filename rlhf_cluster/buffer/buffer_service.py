"""The buffer with waiting: its actor runs this, and tests run it in one process.

Every wait ends at its condition, or after `patience_s` seconds. It then returns None, and the caller
asks again (`ask_until_answered`). So a call never outlives its caller's deadline by more than
`patience_s`, and a caller that died leaves no waiter behind. `take` raises `StalledError` when no group
was finished and kept for `stall_timeout_s` seconds while the learner waited. The message names the
groups that are missing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import ParamSpec, TypeVar

from rlhf_cluster.buffer.buffer import BufferStats, ExperienceBuffer
from rlhf_cluster.errors import StalledError
from rlhf_cluster.records import BufferState, Ticket, TrainingGroup

log = logging.getLogger(__name__)

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def ask_until_answered(
    call: Callable[_P, Awaitable[_T | None]], *args: _P.args, **kwargs: _P.kwargs
) -> _T:
    """Repeat `call`, a wait of the buffer, until it returns something other than None.

    Waits for: what `call` waits for.
    """
    while (answer := await call(*args, **kwargs)) is None:
        pass
    return answer


class BufferService:
    """`BufferPort` of one `ExperienceBuffer`; all methods run on one event loop."""

    def __init__(
        self,
        buffer: ExperienceBuffer,
        stall_timeout_s: float,
        patience_s: float,
        clock: Callable[[], float],
    ) -> None:
        self.buffer = buffer
        self._stall_timeout_s = stall_timeout_s
        self._patience_s = patience_s
        self._clock = clock
        self._changed = asyncio.Condition()
        self._last_progress_s = self._began_s = clock()
        self._admitted_s: deque[tuple[int, float]] = deque()  # (number, when), from the oldest on
        self._learner_waits = False
        self._stopped = False

    async def admit(self) -> list[Ticket] | None:
        """Return tickets for all free slots; [] after the run's last group, or `stop`.

        Waits for: one free slot. Unblocked by: `take`, `discard`, `set_live_version`.
        """
        tickets: list[Ticket] = []

        def free_or_done() -> bool:
            while not self._stopped and (ticket := self.buffer.admit()) is not None:
                tickets.append(ticket)
            return bool(tickets) or self.buffer.complete or self._stopped

        if not await self._wait(free_or_done):
            return None
        if tickets:
            now = self._clock()
            self._oldest_age_s()
            self._admitted_s.extend((ticket.number, now) for ticket in tickets)
        return tickets

    async def finish(self, group: TrainingGroup) -> None:
        async with self._changed:
            if self.buffer.finish(group):
                self._last_progress_s = self._clock()
            self._changed.notify_all()

    async def discard(self, ticket: Ticket, reason: str) -> None:
        log.info("group %s discarded: %s", ticket.group_id, reason)
        async with self._changed:
            self.buffer.discard(ticket, reason)
            self._changed.notify_all()

    async def take(self, num_groups: int, learner_version: int) -> list[TrainingGroup] | None:
        """Return the next groups for training; [] after `stop`.

        Waits for: the groups to finish. Unblocked by: `finish`, `discard`, `stop`.
        """
        async with self._changed:
            self.buffer.set_learner_version(learner_version)
            self._changed.notify_all()
        if not self._learner_waits:
            self._learner_waits = True
            self._last_progress_s = self._clock()
        if await self._wait(lambda: self._stopped or self.buffer.ready(num_groups)):
            self._learner_waits = False
            if self._stopped:
                return []
            async with self._changed:
                groups = self.buffer.take(num_groups)
                self._changed.notify_all()
            return groups
        self._check_stall(num_groups)
        return None

    async def stop(self) -> None:
        """Make `admit` and `take` return [] from here on. The content of the buffer stays."""
        log.info("stopped: nothing is handed out any more")
        async with self._changed:
            self._stopped = True
            self._changed.notify_all()

    async def state(self, learner_version: int) -> BufferState:
        """Return the state for `ExperienceBuffer.resume`. Call between two steps of the learner."""
        async with self._changed:
            self.buffer.set_learner_version(learner_version)
            self._changed.notify_all()
            return self.buffer.state()

    async def set_live_version(self, version: int) -> None:
        log.info("version %d is live on every worker", version)
        async with self._changed:
            self.buffer.set_live_version(version)
            self._changed.notify_all()

    async def set_pipeline_depth(self, depth: int) -> None:
        log.info("pipeline depth: %d", depth)
        async with self._changed:
            self.buffer.set_pipeline_depth(depth)
            self._changed.notify_all()

    async def exclude_from_replay(self, numbers: Sequence[int]) -> None:
        async with self._changed:
            self.buffer.exclude_from_replay(numbers)

    async def stats(self) -> BufferStats:
        return replace(self.buffer.stats(), oldest_age_s=self._oldest_age_s())

    def _oldest_age_s(self) -> float:
        """Return the seconds since the admission of the oldest group, 0 without a group.

        For a group that was open at a resume they are counted from the resume.
        """
        oldest, admitted = self.buffer.oldest, self._admitted_s
        while admitted and (oldest is None or admitted[0][0] < oldest):
            admitted.popleft()
        if oldest is None:
            return 0.0
        known = admitted and admitted[0][0] == oldest
        return self._clock() - (admitted[0][1] if known else self._began_s)

    async def _wait(self, condition: Callable[[], bool]) -> bool:
        async with self._changed:
            try:
                async with asyncio.timeout(self._patience_s):
                    await self._changed.wait_for(condition)
            except TimeoutError:
                return False
            return True

    def _check_stall(self, num_groups: int) -> None:
        waited_s = self._clock() - self._last_progress_s
        if waited_s < self._stall_timeout_s:
            return
        stats = self.buffer.stats()
        missing = ", ".join(stats.in_flight[:8]) or "none admitted"
        more = f" and {len(stats.in_flight) - 8} more" if len(stats.in_flight) > 8 else ""
        raise StalledError(
            f"no group finished for {waited_s:.1f} s (run.stall_timeout_s = "
            f"{self._stall_timeout_s:g}) while the learner waited for {num_groups} groups at "
            f"version {stats.learner_version}. "
            f"Buffer: {stats.ready} ready, {len(stats.in_flight)} in flight, "
            f"{stats.num_discarded} discarded {stats.discarded or ''}. Live version: "
            f"{stats.live_version}. Pending groups: {missing}{more}"
        )
