"""Actor of the experience buffer, and its client.

The actor holds handles (object references), never arrays: they arrive and leave inside a
`TrainingGroup`, so Ray passes the reference on instead of fetching the object. Both waits end at the
buffer's stall deadline, or with `CoreLost` if the actor is dead.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from actors.cluster.calls import Client, remote
from actors.cluster.launch import check_code
from actors.cluster.ray_metrics import RayMetrics
from rlhf_cluster.buffer.buffer import BufferStats, ExperienceBuffer, buffer_metrics
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.replay_pool import build_replay_pool
from rlhf_cluster.buffer.staleness import build_gate
from rlhf_cluster.config import RunConfig
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.observe.record.logs import configure
from rlhf_cluster.records import BufferState

log = logging.getLogger(__name__)

PATIENCE_S = 5.0
CALL_TIMEOUT_S = PATIENCE_S + 60.0


class BufferActor(BufferService):
    """`BufferService` in a separate process."""

    def __init__(self, config: RunConfig, state: BufferState | None = None) -> None:
        """`state`: the buffer's part of the checkpoint from which the run resumes."""
        check_code()
        configure("buffer", "buffer", config.run_dir / "logs")
        self._metrics = RayMetrics("buffer", {"run": config.run.name})
        gate = build_gate(config)
        replay = build_replay_pool(config.buffer.replay, config.run, config.staleness)
        log.info("admitting by %s", gate)
        buffer = (
            ExperienceBuffer.resume(gate, state, replay)
            if state
            else ExperienceBuffer(gate, replay=replay)
        )
        super().__init__(buffer, config.run.stall_timeout_s, PATIENCE_S, time.monotonic)

    async def present(self, after_s: float) -> None:
        """Return after `after_s` seconds, which shows that the process is alive."""
        await asyncio.sleep(after_s)

    async def stats(self) -> BufferStats:
        stats = await super().stats()
        self._metrics.record(buffer_metrics(stats))
        self._metrics.gauge("buffer/resident_bytes", resident_bytes())
        return stats


class RayBuffer(Client):
    """`BufferPort` that calls a `BufferActor`."""

    def __init__(self, actor: Any) -> None:
        super().__init__(actor, "buffer")

    admit = remote(BufferService.admit, CALL_TIMEOUT_S)
    finish = remote(BufferService.finish, CALL_TIMEOUT_S)
    discard = remote(BufferService.discard, CALL_TIMEOUT_S)
    take = remote(BufferService.take, CALL_TIMEOUT_S)
    stop = remote(BufferService.stop, CALL_TIMEOUT_S)
    state = remote(BufferService.state, CALL_TIMEOUT_S)
    stats = remote(BufferService.stats, CALL_TIMEOUT_S)
    set_live_version = remote(BufferService.set_live_version, CALL_TIMEOUT_S)
    set_pipeline_depth = remote(BufferService.set_pipeline_depth, CALL_TIMEOUT_S)
    exclude_from_replay = remote(BufferService.exclude_from_replay, CALL_TIMEOUT_S)
