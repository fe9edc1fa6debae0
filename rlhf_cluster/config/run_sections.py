"""The sections of a run file, and the values that are computed from several of them.

The checks of a run (`check_*.py`) read these; `run_config` calls the checks. Computed values are
properties, so that every value has one owner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Self

from rlhf_cluster.algorithms import ALGORITHMS, AlgorithmConfig, GrpoConfig
from rlhf_cluster.config.pools import Autoscale, Scoring
from rlhf_cluster.records import Sampling
from rlhf_cluster.sections.evaluation import Evaluation
from rlhf_cluster.sections.every_run import Model, RunFile
from rlhf_cluster.sections.rl_run import (
    Buffer,
    Critic,
    Data,
    Generation,
    Run,
    Sft,
    Staleness,
    Weights,
)
from rlhf_cluster.sections.training import (
    Checkpoint,
    Learner,
)
from rlhf_cluster.sections.values import Dtype, Rounding


class RunSections(RunFile[Run]):
    """The sections of one reinforcement-learning run, each valid by itself."""

    model: Model
    data: Data
    algorithm: AlgorithmConfig = GrpoConfig()
    """Algorithm that makes advantages and a loss of scored groups, chosen by its `type`."""
    generation: Generation
    scoring: Scoring
    learner: Learner
    critic: Critic = Critic()
    sft: Sft = Sft()
    evaluation: Evaluation = Evaluation()
    staleness: Staleness = Staleness()
    weights: Weights = Weights()
    buffer: Buffer = Buffer()
    checkpoint: Checkpoint = Checkpoint()
    autoscale: Autoscale | None = None

    @property
    def weights_dir(self) -> Path:
        root = self.weights.root
        return Path(root) / self.run.name if root else self.run_dir / "weights"

    def with_absolute_paths(self) -> Self:
        folders = {"root": self.weights.root, "mirror": self.weights.mirror}
        whole = {key: str(Path(value).absolute()) for key, value in folders.items() if value}
        weights = self.weights.model_copy(update=whole)
        return super().with_absolute_paths().model_copy(update={"weights": weights})

    @property
    def stored_reference(self) -> bool:
        """Whether the reference is written during the run rather than read from the model folder."""
        scoring = self.scoring
        moves = scoring.reference_update.type != "fixed"
        rounded = self.learner.lora is not None and self.learner.lora.quantize_base
        return scoring.reference and (self.sft.steps > 0 or moves or rounded)

    @property
    def fresh_groups(self) -> int:
        """Number of groups per step that were not trained before.

        Admission and the staleness bound count these.
        """
        groups, replay = self.run.groups_per_step, self.buffer.replay
        return groups if replay is None else groups - replay.num_replayed(groups)

    def pull_deadline_s(self, num_bytes: int) -> float:
        """Return the deadline, in seconds, for a worker to load a version of `num_bytes`.

        With the relay it covers the copy to the worker's node; always the reading and applying.
        """
        return (2 if self.weights.is_relayed else 1) * self.generation.take_deadline_s(num_bytes)

    @property
    def publish_dtype(self) -> Dtype:
        return self.weights.dtype or self.generation.dtype

    @property
    def publish_rounding(self) -> Rounding:
        """Rounding of merged adapters to the published type."""
        is_rounded = self.learner.lora is not None and self.publish_dtype == "bfloat16"
        return self.weights.rounding or ("stochastic" if is_rounded else "nearest")

    @property
    def max_sequence_tokens(self) -> int:
        return self.data.max_prompt_tokens + self.generation.max_response_tokens

    @property
    def tokens_per_row(self) -> int:
        """Capacity, in tokens, of a row of the learner, which holds what must share a micro-batch."""
        return self.learner.tokens_per_row or self.max_unit_tokens

    @property
    def max_unit_tokens(self) -> int:
        return self.max_sequence_tokens * self.algorithm.unit_size

    @property
    def trained_algorithm(self) -> AlgorithmConfig:
        """The section `algorithm`. For GDPO, unset weights are those of `scoring.rewards`."""
        if self.algorithm.type != "gdpo":
            return self.algorithm
        weights = {r.name or r.type: r.weight for r in self.scoring.rewards if not r.watch}
        return self.algorithm.model_copy(
            update={"reward_weights": {**weights, **self.algorithm.reward_weights}}
        )

    @property
    def sampling(self) -> Sampling:
        """Sampling settings of every group of the run."""
        return Sampling(
            num_samples=self.algorithm.group_size,
            temperature=self.generation.temperature,
            max_tokens=self.generation.max_response_tokens,
            greedy_baseline=ALGORITHMS[self.algorithm.type](self.algorithm).needs_greedy,
        )
