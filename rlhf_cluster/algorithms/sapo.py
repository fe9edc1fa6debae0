"""SAPO: GRPO with a soft gate instead of the clip.

    J = E_t f(r_t) A_i,   f(r) = (4 / tau) sigmoid(tau (r - 1)),   tau = tau_pos if A_i > 0 else tau_neg

Near r = 1 the gradient is that of r A; it fades as the ratio moves away, faster for negative advantages
(the larger tau), and never vanishes at an edge. Gao et al. 2025, arXiv 2511.20347.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveFloat

from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.group_relative import GroupRelative, GroupRelativeConfig
from rlhf_cluster.algorithms.policy_losses import gated_policy_loss

if TYPE_CHECKING:
    from torch import Tensor


class SapoConfig(GroupRelativeConfig):
    """Soft adaptive policy optimisation (Gao et al. 2025, arXiv 2511.20347)."""

    type: Literal["sapo"] = "sapo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    positive_temperature: PositiveFloat = 1.0
    """tau of the gate for tokens with a positive advantage."""
    negative_temperature: PositiveFloat = 1.05
    """tau of the gate for all other tokens."""


class Sapo(GroupRelative[SapoConfig]):
    """SAPO by the formula of the module's docstring."""

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        config = self.config
        losses = gated_policy_loss(
            log_ratios,
            inputs.advantages,
            config.positive_temperature,
            config.negative_temperature,
        )
        return losses, {}
