"""GRPO: advantages relative to the group, the clipped surrogate.

    A_i = (R_i - mean(group)) / (std(group) + 1e-4)
    J = E_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i)

Everything else, such as correction weights and the KL, is in `policy_gradient`. With two samples per
prompt (`group_size = 2`) the better and the worse answer have advantages of +-0.7 whatever the
rewards, or 0 if these are equal (Wu et al. 2025, arXiv 2510.00977).

`docs/examples/grpo_in_60_lines.py` computes this loss step by step.

Shao et al. 2024, arXiv 2402.03300; unequal clip bounds: Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.group_relative import GroupRelative, GroupRelativeConfig
from rlhf_cluster.algorithms.policy_gradient import clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig

if TYPE_CHECKING:
    from torch import Tensor


class GrpoConfig(ClippedConfig, GroupRelativeConfig):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""


class Grpo(GroupRelative[GrpoConfig]):
    """GRPO by the formula of the module's docstring."""

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)
