"""Actor of the experience buffer, and its client.

The actor holds handles (object references), never arrays. Both waits of the client end at the buffer's
stall deadline, or with `CoreLost` if the actor is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from actors.cluster.calls import core_answer
from actors.cluster.launch import check_code
from actors.cluster.ray_metrics import RayMetrics
from rlhf_cluster.buffer.buffer import (
    BufferStats,
    ExperienceBuffer,
    buffer_metrics,
)
from rlhf_cluster.buffer.buffer_service import (
    Answer,
    BufferService,
)
from rlhf_cluster.buffer.replay_pool import replay_pool
from rlhf_cluster.buffer.staleness import gate_of
from rlhf_cluster.config import RunConfig
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.observe.record.logs import configure
from rlhf_cluster.records import (
    BufferState,
    GroupSummary,
    Handle,
    Ticket,
    TrainingGroup,
)

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
REPLY_MARGIN_S = 60.0


def buffer_service(config: RunConfig, state: BufferState | None = None) -> BufferService:
    """Build the buffer of a run, from the `state` of a checkpoint if the run resumes from one."""
    gate = gate_of(config)
    replay = replay_pool(config)
    buffer = (
        ExperienceBuffer.resume(gate, state, replay)
        if state
        else ExperienceBuffer(gate, replay=replay)
    )
    log.info("admitting by %s", gate)
    return BufferService(buffer, config.run.stall_timeout_s, PATIENCE_S, time.monotonic)


class BufferActor:
    """`BufferService` in a separate process.

    Handles arrive and leave inside a list, including those of replayed groups, so that Ray passes the
    reference on instead of fetching the object.
    """

    def __init__(self, config: RunConfig, state: BufferState | None = None) -> None:
        """`state`: the buffer's part of the checkpoint from which the run resumes."""
        check_code()
        configure("buffer", "buffer", config.run_dir / "logs")
        self._metrics = RayMetrics("buffer", {"run": config.run.name})
        self._service = buffer_service(config, state)

    async def admit(self) -> list[Ticket] | Answer:
        return await self._service.admit()

    async def finish(self, ticket: Ticket, handle: list[Handle], summary: GroupSummary) -> None:
        await self._service.finish(ticket, handle, summary)

    async def discard(self, ticket: Ticket, reason: str) -> None:
        log.info("group %s discarded: %s", ticket.group_id, reason)
        await self._service.discard(ticket, reason)

    async def take(self, num_groups: int, learner_version: int) -> Sequence[TrainingGroup] | Answer:
        found = await self._service.take(num_groups, learner_version)
        if isinstance(found, Answer):
            return found
        return [replace(taken, handle=[taken.handle]) if taken.uses else taken for taken in found]

    async def version_live(self, version: int) -> None:
        log.info("version %d is live on every worker", version)
        await self._service.version_live(version)

    async def stop(self) -> None:
        log.info("stopped: nothing is handed out any more")
        await self._service.stop()

    async def state(self, learner_version: int) -> BufferState:
        return await self._service.state(learner_version)

    async def set_pipeline_depth(self, depth: int) -> None:
        log.info("pipeline depth: %d", depth)
        await self._service.set_pipeline_depth(depth)

    async def forget(self, numbers: Sequence[int]) -> None:
        await self._service.forget(numbers)

    async def present(self, after_s: float) -> None:
        """Return after `after_s` seconds, which shows that the process is alive."""
        await asyncio.sleep(after_s)

    async def stats(self) -> BufferStats:
        stats = await self._service.stats()
        self._metrics.record(buffer_metrics(stats))
        self._metrics.gauge("buffer/resident_bytes", resident_bytes())
        return stats


class RayBuffer:
    """`BufferPort` that calls a `BufferActor`."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def admit(self) -> list[Ticket]:
        """Return tickets for new groups; [] when the run ends.

        Waits for: a free slot. Unblocked by: the learner, a live version, the end of the run.
        """
        while True:
            reply = await self._call("admit")
            if not isinstance(reply, Answer):
                return reply
            if reply is Answer.DONE:
                return []

    async def finish(self, ticket: Ticket, handle: Handle, summary: GroupSummary) -> None:
        await self._call("finish", ticket, [handle], summary)

    async def discard(self, ticket: Ticket, reason: str) -> None:
        await self._call("discard", ticket, reason)

    async def take(self, num_groups: int, learner_version: int) -> Sequence[TrainingGroup]:
        """Return `num_groups` groups to train on; [] after `stop`.

        Raises: `StalledError` after the buffer's stall deadline.
        Waits for: finished groups. Unblocked by: the rollout loop, `stop`.
        """
        while True:
            reply = await self._call("take", num_groups, learner_version)
            if not isinstance(reply, Answer):
                return reply
            if reply is Answer.DONE:
                return []

    async def version_live(self, version: int) -> None:
        await self._call("version_live", version)

    async def stop(self) -> None:
        await self._call("stop")

    async def state(self, learner_version: int) -> BufferState:
        return await self._call("state", learner_version)

    async def set_pipeline_depth(self, depth: int) -> None:
        await self._call("set_pipeline_depth", depth)

    async def forget(self, numbers: Sequence[int]) -> None:
        await self._call("forget", numbers)

    async def stats(self) -> BufferStats:
        return await self._call("stats")

    async def _call(self, method: str, *arguments: Any) -> Any:
        ref = getattr(self._actor, method).remote(*arguments)
        return await core_answer(ref, PATIENCE_S + REPLY_MARGIN_S, f"buffer.{method}")
