"""The pool workers as actors: the plain workers plus log file and Prometheus metrics."""

from __future__ import annotations

import time
from typing import Any

import ray

from actors.engine import LoadedWeights
from actors.generation import GenerationWorker
from actors.metrics import RayMetrics
from actors.scoring import ScoringWorker
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.observe.logs import configure
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    Prompt,
    RolloutGroup,
    Sampling,
    Ticket,
    WeightVersion,
)

HEALTH_GROUP = "health"
ENGINE_GAUGES = {
    "engine/num_running": "generation/requests_running",
    "engine/num_waiting": "generation/requests_waiting",
    "engine/kv_cache_use_fraction": "generation/kv_cache_use_fraction",
}


class GenerationActor(GenerationWorker):
    def __init__(self, config: RunConfig, model_dir: str, name: str, engine_factory: str) -> None:
        configure("generation", name, config.run_dir / "logs")
        super().__init__(config, model_dir, name, engine_factory)
        self._metrics = RayMetrics("generation", {"worker": name})

    async def generate(
        self, ticket: Ticket, prompt: Prompt, sampling: Sampling
    ) -> tuple[dict[str, Any], RolloutGroup]:
        try:
            meta, group = await super().generate(ticket, prompt, sampling)
        except RlhfError as error:
            self._metrics.count(f"generation/errors_total/{type(error).__name__}")
            raise
        self._metrics.count("generation/groups_total")
        self._metrics.count("generation/tokens_total", meta["num_tokens"])
        self._metrics.observe("generation/group_s", meta["generate_s"])
        return meta, group

    async def pull(self, version: WeightVersion) -> LoadedWeights:
        start = time.perf_counter()
        loaded = await super().pull(version)
        self._metrics.count("generation/pulls_total")
        self._metrics.observe("generation/pull_s", time.perf_counter() - start)
        self._metrics.observe("generation/pull_pause_s", loaded.pause_s)
        self._metrics.gauge("generation/version_live", loaded.version)
        return loaded

    async def health(self) -> dict[str, Any]:
        answer = await super().health()
        stats = await self.stats()
        for key, name in ENGINE_GAUGES.items():
            if key in stats:
                self._metrics.gauge(name, stats[key])
        return answer


class ScoringActor(ScoringWorker):
    def __init__(self, config: RunConfig, model_dir: str, name: str) -> None:
        configure("scoring", name, config.run_dir / "logs")
        super().__init__(config, model_dir, name)
        self._metrics = RayMetrics("scoring", {"worker": name})

    @ray.method(concurrency_group=HEALTH_GROUP)
    def health(self) -> dict[str, Any]:
        """Answered in a thread of its own: hanging rewards must not look like a dead worker."""
        return super().health()

    def score(self, group: RolloutGroup) -> tuple[GroupSummary, ExperienceGroup]:
        start = time.perf_counter()
        try:
            answer = super().score(group)
        except RlhfError as error:
            self._metrics.count(f"scoring/errors_total/{type(error).__name__}")
            raise
        self._metrics.count("scoring/groups_total")
        self._metrics.observe("scoring/latency_s", time.perf_counter() - start)
        return answer
