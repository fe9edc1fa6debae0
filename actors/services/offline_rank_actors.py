"""Ranks of an offline stage: the actor of one rank, the client of all, and their common lifetime.

Every rank gets all units of a batch, and selects its share by the same plan (`learner.offline_rank`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray

from actors.services.learner_core import Core
from actors.services.rank_actors import (
    RankActor,
    RayRanks,
    judging,
)
from rlhf_cluster.config import StageConfig
from rlhf_cluster.data.units import Unit
from rlhf_cluster.records import StepReport, WeightVersion
from rlhf_cluster.weights.writer_fence import Writer

log = logging.getLogger(__name__)


class StageActor(RankActor):
    """Actor of one rank of a stage."""

    def __init__(self, config: StageConfig, model_dir: str, rank: int, num_steps: int) -> None:
        super().__init__(config, model_dir, rank)
        self._num_steps = num_steps

    @functools.partial(judging, starting=True)
    def setup(self, init_method: str) -> dict[str, Any]:
        from rlhf_cluster.learner.offline_rank import StageRank

        self._open()
        ranks = self._config.learner.ranks
        self._rank = StageRank(
            self._config, self._model_dir, self._number, ranks, init_method, self._num_steps
        )
        facts = self._rank.setup()
        log.info("set up: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        return facts

    @judging
    def train(self, units: list[Unit]) -> StepReport:
        return self._rank.train(units)

    @judging
    def evaluate(self, units: list[Unit]) -> dict[str, float]:
        return self._rank.evaluate(units)

    @judging
    def report(self, units: list[Unit]) -> dict[str, Any]:
        return self._rank.report(units)

    @judging
    def write_final(self, root: str, writer: Writer) -> Any:
        return self._rank.write_final(root, writer.attempt)

    @judging
    def commit_final(
        self, root: str, reports: list[Any], timeout_s: float, writer: Writer
    ) -> WeightVersion:
        from rlhf_cluster.weights.store import commit

        version = reports[0].version
        return commit(
            root,
            version,
            reports,
            keep=1,
            expected_names=self._rank.tensor_shapes(),
            fsync=True,
            lock_timeout_s=timeout_s,
            writer=writer,
        )


class RayStage(RayRanks):
    """Client that calls all ranks of a stage."""

    async def train(self, units: Sequence[Unit]) -> StepReport:
        return (await self._all("train", self._step_s, ray.put(list(units))))[0]

    async def evaluate(self, units: Sequence[Unit]) -> dict[str, float]:
        return (await self._all("evaluate", self._step_s, ray.put(list(units))))[0]

    async def report(self, units: Sequence[Unit]) -> dict[str, Any]:
        return (await self._all("report", self._step_s, ray.put(list(units))))[0]

    async def write_final(self, root: Path, writer: Writer) -> WeightVersion:
        timeout_s = self._config.checkpoint.timeout_s
        reports = await self._all("write_final", timeout_s, str(root), writer)
        ref = self._actors[0].commit_final.remote(str(root), reports, timeout_s, writer)
        return (await self._answers([ref], timeout_s, "commit_final"))[0]

    @property
    def _step_s(self) -> float:
        return self._config.learner.step_timeout_s


class StageCore(Core):
    """Ranks of a stage, which are started and ended together."""

    async def start_stage(self, num_steps: int) -> RayStage:
        config = self._launcher.config
        _, group = await self.place_ranks(ray.available_resources)
        stage = RayStage(self.spawn_ranks(StageActor, config, group, num_steps), config)
        await stage.setup()
        return stage
