"""Offline stages: one file each, one entry in `STAGES`, one in the union. No torch is loaded here.

A stage trains a model on existing data: supervised fine-tuning, preferences, reward models,
distillation. It shares packing, learner, checkpoints and records with reinforcement learning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from rlhf_cluster.offline.stage import (
    Stage,
    StageContext,
)
from rlhf_cluster.offline.train_distillation import (
    DistillationConfig,
    DistillationStage,
)
from rlhf_cluster.offline.train_preference import (
    PreferenceConfig,
    PreferenceStage,
)
from rlhf_cluster.offline.train_process_reward_model import (
    ProcessRewardModelStage,
    ProcessRewardModelStageConfig,
)
from rlhf_cluster.offline.train_reward_model import (
    PointwiseRewardModelConfig,
    PointwiseRewardModelStage,
    RewardModelStage,
    RewardModelStageConfig,
)
from rlhf_cluster.offline.train_sft import (
    SftConfig,
    SftStage,
)
from rlhf_cluster.sections.extensions import FromOtherPackages, Table
from rlhf_cluster.sections.offline_stage import StageSectionBase

_BUILT_IN: Mapping[str, type[Stage[Any]]] = {
    "distillation": DistillationStage,
    "pointwise_reward_model": PointwiseRewardModelStage,
    "preference": PreferenceStage,
    "process_reward_model": ProcessRewardModelStage,
    "reward_model": RewardModelStage,
    "sft": SftStage,
}
STAGES = Table("stage", "rlhf_cluster.stages", _BUILT_IN, StageSectionBase)
"""Classes of stages by the `type` of their section."""

StageSection = Annotated[
    DistillationConfig
    | PointwiseRewardModelConfig
    | PreferenceConfig
    | ProcessRewardModelStageConfig
    | RewardModelStageConfig
    | SftConfig,
    Field(discriminator="type"),
    FromOtherPackages(STAGES),
]


def build_stage(section: Any, context: StageContext) -> Stage[Any]:
    """Build the stage of a section."""
    return STAGES[section.type](section, context)
