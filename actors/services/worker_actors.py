"""Pool workers as actors: the plain workers with a log file and Prometheus metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from actors.cluster.launch import check_code
from actors.cluster.ray_metrics import RayMetrics
from actors.weights.node_mirrors import mirror_of
from rlhf_cluster.buffer.group_recovery import store_of
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.generation.engine import LoadedWeights
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.observe.metrics import scoring_totals
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.observe.record.logs import configure
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    PartialGroup,
    Prompt,
    RolloutGroup,
    Sampling,
    Ticket,
    WeightVersion,
)
from rlhf_cluster.scoring.score_parts import ScorePart
from rlhf_cluster.scoring.scoring_worker import ScoringWorker

log = logging.getLogger(__name__)

HEALTH_GROUP = "health"
ENGINE_GAUGES = {
    "engine/num_running": "generation/requests_running",
    "engine/num_waiting": "generation/requests_waiting",
    "engine/kv_cache_use_fraction": "generation/kv_cache_use_fraction",
}
ENGINE_TOTALS = {
    f"engine/{name}": f"generation/{name}"
    for kind in ("prefix", "prefix_hit", "draft", "draft_accepted")
    for name in (f"{kind}_tokens_total",)
}


class GenerationActor(GenerationWorker):
    def __init__(self, config: RunConfig, model_dir: str, name: str, engine_factory: str) -> None:
        check_code()
        configure("generation", name, config.run_dir / "logs")
        super().__init__(config, model_dir, name, engine_factory, mirror_of(config, name))
        self._metrics = RayMetrics("generation", {"run": config.run.name, "worker": name})

    async def start(self) -> dict[str, float]:
        facts = await super().start()
        log.info("engine up after %.1f s", facts["start_s"])
        return facts

    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        partial: PartialGroup | None = None,
    ) -> tuple[dict[str, Any], RolloutGroup | PartialGroup]:
        try:
            meta, group = await super().generate(ticket, prompt, sampling, partial)
        except RlhfError as error:
            self._metrics.count(f"generation/errors_total/{type(error).__name__}")
            log.info("group %s: %s: %s", ticket.group_id, type(error).__name__, error)
            raise
        self._metrics.count("generation/tokens_total", meta["num_tokens"])
        if partial is None:
            self._metrics.count("generation/prompt_tokens_total", len(prompt.token_ids))
        if isinstance(group, RolloutGroup):
            rollout = group.rollouts[0]
            for response in group.rollouts:
                self._metrics.count(f"generation/responses_total/{response.finish_reason}")
            self._metrics.count("generation/groups_total")
            self._metrics.observe("generation/group_s", rollout.finished_s - rollout.started_s)
        return meta, group

    async def pull(self, version: WeightVersion) -> LoadedWeights:
        start = time.perf_counter()
        loaded = await super().pull(version)
        self._metrics.count("generation/pulls_total")
        self._metrics.observe("generation/pull_s", time.perf_counter() - start)
        self._metrics.observe("generation/pull_pause_s", loaded.pause_s)
        self._metrics.gauge("generation/version_live", loaded.version)
        log.info(
            "version %d live: %d tensors, digest %s, sampling paused %.0f ms",
            loaded.version,
            loaded.num_tensors,
            loaded.digest,
            1000 * loaded.pause_s,
        )
        return loaded

    async def health(self) -> dict[str, Any]:
        answer = await super().health()
        stats = await self.stats()
        for key, name in ENGINE_GAUGES.items():
            if key in stats:
                self._metrics.gauge(name, stats[key])
        for key, name in ENGINE_TOTALS.items():
            if key in stats:
                self._metrics.count_up_to(name, stats[key])
        self._metrics.gauge("generation/resident_bytes", resident_bytes())
        return answer


class ScoringActor(ScoringWorker):
    """Actor of a worker in any scoring pool."""

    def __init__(self, config: RunConfig, model_dir: str, name: str, pool: str) -> None:
        check_code()
        configure("scoring", name, config.run_dir / "logs")
        super().__init__(config, model_dir, name, store_of(config), pool)
        self._metrics = RayMetrics("scoring", {"run": config.run.name, "worker": name})

    def start(self) -> dict[str, float]:
        facts = super().start()
        versions = self._rewards.versions
        log.info("rewards and models up after %.1f s, versions %s", facts["start_s"], versions)
        return facts

    def load_reference(self, version: WeightVersion) -> None:
        super().load_reference(version)
        self._metrics.gauge("scoring/reference_version", version.version)
        log.info("reference of version %d loaded, digest %s", version.version, version.digest)

    @ray.method(concurrency_group=HEALTH_GROUP)
    def health(self) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Answer a health check in a separate thread, so that hanging rewards do not delay it."""
        answer = super().health()
        self._metrics.gauge("scoring/groups_running", answer["num_in_flight"])
        self._metrics.gauge("scoring/resident_bytes", resident_bytes())
        for name, total in scoring_totals(self.stats()).items():
            self._metrics.count_up_to(name, total)
        return answer

    def score(self, group: RolloutGroup) -> tuple[GroupSummary, ExperienceGroup]:
        with self._measure(group):
            answer = super().score(group)
        self._metrics.count("scoring/groups_total")
        return answer

    def score_part(self, group: RolloutGroup) -> tuple[int, ScorePart]:
        with self._measure(group):
            return super().score_part(group)

    def join(self, group: RolloutGroup, *parts: ScorePart) -> tuple[GroupSummary, ExperienceGroup]:
        with self._measure(group):
            answer = super().join(group, *parts)
        self._metrics.count("scoring/groups_total")
        return answer

    @contextmanager
    def _measure(self, group: RolloutGroup) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        except RlhfError as error:
            self._metrics.count(f"scoring/errors_total/{type(error).__name__}")
            log.info("group %s: %s: %s", group.group_id, type(error).__name__, error)
            raise
        self._metrics.observe("scoring/latency_s", time.perf_counter() - start)
