"""Dr. GRPO: GRPO without its two biases, and nothing else changed.

    A_i = R_i - mean(group)          no division by the group's standard deviation
    J = (1 / (R L)) sum_i sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i)

with L = `generation.max_response_tokens`. Dividing by the length of the response rewards long wrong
answers; dividing by the standard deviation favours prompts that are nearly solved or nearly
hopeless. Liu et al. 2025, arXiv 2503.20783.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.group_relative import GroupRelative, StepConfig
from rlhf_cluster.algorithms.policy_gradient import clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.algorithms.policy_losses import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


class DrGrpoConfig(ClippedConfig, StepConfig):
    """GRPO done right (Liu et al. 2025, arXiv 2503.20783)."""

    type: Literal["dr_grpo"] = "dr_grpo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    aggregation: Aggregation = "fixed_length"
    clip_high: float = Field(default=0.2, gt=0)


class DrGrpo(GroupRelative[DrGrpoConfig]):
    """Dr. GRPO by the formula of the module's docstring."""

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)
