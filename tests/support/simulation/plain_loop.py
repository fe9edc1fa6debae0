"""The training loop as one would write it first: one thing after the other, in one process.

No Ray, no pipeline, no buffer, no background publish. Only the parts are those of a run: the inputs,
the engine (in a process of its own, because vLLM cannot share one with a learner), the scorer, the
learner rank, the weight store. A run with `max_staleness = 0` and one rank has to do the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.config import RunConfig
from rlhf_cluster.generation.engine import (
    LoadedWeights,
    Request,
    Sample,
)
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.planning.run_inputs import (
    Inputs,
    check_inputs,
)
from rlhf_cluster.records import ExperienceGroup, Ticket, WeightVersion
from rlhf_cluster.scoring.scoring_worker import ScoringWorker
from tests.support.engines.engine_process import EngineProcess

if TYPE_CHECKING:
    from rlhf_cluster.learner.learner_rank import LearnerRank


@dataclass(frozen=True, slots=True)
class PlainStep:
    """What one step trained on, and what the learner said of it."""

    groups: list[ExperienceGroup]
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class PlainRun:
    steps: list[PlainStep]
    last: WeightVersion


class RemoteEngine:
    """An `Engine` whose vLLM lives in a child process."""

    def __init__(self, config: RunConfig, model_dir: str, name: str) -> None:
        self._config, self._model_dir, self._name = config, model_dir, name

    async def start(self) -> None:
        self._process = await asyncio.to_thread(EngineProcess, self._config, self._model_dir)

    async def generate(self, request: Request) -> list[Sample]:
        return await self._process.generate(request)

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        return await self._process.load_weights(version)

    def stats(self) -> Mapping[str, float]:
        return {"num_waiting": 0.0}

    def check(self) -> None:
        pass  # every call raises what the child raised

    async def close(self) -> None:
        await asyncio.to_thread(self._process.close)


def train(config: RunConfig, folder: Path) -> PlainRun:
    """Train `config` from warm-up to last step. Writes model and weights into the empty `folder`."""
    from rlhf_cluster.learner.learner_rank import LearnerRank

    inputs = check_inputs(config, folder)
    model_dir = str(inputs.model_dir)
    learner = LearnerRank(config, model_dir, 0, 1, None)
    scorer = ScoringWorker(config, model_dir, "plain")
    try:
        learner.setup()
        for examples in inputs.warmup_batches():
            learner.sft_step(examples)
        scorer.start()
        return asyncio.run(_train(config, inputs, learner, scorer, str(folder / "weights")))
    finally:
        scorer.close()
        learner.close()


async def _train(
    config: RunConfig, inputs: Inputs, learner: LearnerRank, scorer: ScoringWorker, root: str
) -> PlainRun:
    generation = GenerationWorker(
        config,
        str(inputs.model_dir),
        "plain",
        engine_factory="tests.support.simulation.plain_loop:RemoteEngine",
    )
    await generation.start()
    try:
        steps: list[PlainStep] = []
        for step in range(config.run.steps):
            version = publish(learner, root)
            await generation.pull(version)
            if step == 0 and config.stored_reference:
                scorer.load_reference(version)
            groups = []
            for place in range(config.run.groups_per_step):
                ticket = Ticket(number=step * config.run.groups_per_step + place, version=step)
                _, sampled = await generation.generate(
                    ticket, inputs.prompts.next(), config.sampling
                )
                groups.append(scorer.score(sampled)[1])
            steps.append(PlainStep(groups, learner.train_step(groups).metrics))
        return PlainRun(steps, publish(learner, root))
    finally:
        await generation.close()


def publish(learner: LearnerRank, root: str) -> WeightVersion:
    from rlhf_cluster.weights import store

    version = learner.snapshot()
    report = learner.write_snapshot(root)
    return store.commit(root, version, [report], keep=100, expected_names=learner.tensor_shapes())
