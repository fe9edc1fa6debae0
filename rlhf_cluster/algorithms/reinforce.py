"""Plain REINFORCE: reward minus an optional baseline, times the ratio; nothing is clipped.

    J = E_t r_t A_i,   A_i = R_i                          baseline = "none"
                       A_i = R_i - mean(all of the step)  baseline = "batch"
                       A_i = R_i - mean(group)            baseline = "group"

With one optimizer step per batch r_t is 1 in value and the gradient A_i grad log pi_t; with more it is
the exact importance ratio. Each mean contains R_i itself, which shrinks the gradient by 1 - 1/n and
leaves its direction. Williams 1992, Machine Learning 8.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.advantages import group_advantages
from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient
from rlhf_cluster.algorithms.policy_gradient_config import PolicyGradientConfig
from rlhf_cluster.algorithms.policy_losses import plain_policy_loss

if TYPE_CHECKING:
    from torch import Tensor


class ReinforceConfig(PolicyGradientConfig):
    """REINFORCE (Williams 1992)."""

    type: Literal["reinforce"] = "reinforce"
    group_size: int = Field(default=1, ge=1)
    """Rollouts of one prompt."""
    baseline: Literal["none", "batch", "group"] = "batch"
    """Value subtracted from each reward: none, or the mean over the step or over the group."""

    @model_validator(mode="after")
    def _baseline_fits(self) -> ReinforceConfig:
        if self.baseline == "group" and self.group_size == 1:
            raise ValueError(
                "baseline = 'group' with group_size = 1: a reward minus itself is always 0, and "
                "nothing would be learned. Use baseline = 'batch', or larger groups"
            )
        return self


class Reinforce(PolicyGradient[ReinforceConfig]):
    """REINFORCE by the formula of the module's docstring."""

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        if self.config.baseline == "none":
            return rewards
        ids = group_ids if self.config.baseline == "group" else [""] * len(rewards)
        return group_advantages(rewards.tolist(), ids, normalize_std=False)

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return plain_policy_loss(log_ratios, inputs.advantages), {}
