"""GSPO: one ratio for a whole response, normalised by its length, clipped as a whole.

    s_i = exp( (1 / T_i) sum_t (log pi_t - log prox_t) )
    J = (1 / R) sum_i min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)

The gradient flows through the mean, so a response's tokens move together or, where s_i is clipped,
not at all. Every token carries its response's loss; with `aggregation = "sequence_mean"` their
weighted sum is J. The bounds are small, because a mean of log-ratios is. Advantages are those of
GRPO; the correction weight is normalised by length too (`geometric_tis`).
Zheng et al. 2025, arXiv 2507.18071.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.advantages import group_advantages
from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.importance_weights import sequence_means
from rlhf_cluster.algorithms.off_policy_correction import Correction, GeometricTis
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.algorithms.policy_losses import Aggregation

if TYPE_CHECKING:
    from torch import Tensor


class GspoConfig(ClippedConfig):
    """Group sequence policy optimisation (Zheng et al. 2025, arXiv 2507.18071)."""

    type: Literal["gspo"] = "gspo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    normalize_std: bool = True
    """Divide the centred rewards by the group's standard deviation."""
    clip_low: float = Field(default=3e-4, gt=0, lt=1)
    """Distance from 1 to the lower bound of a response's ratio."""
    clip_high: float = Field(default=4e-4, gt=0)
    """Bounds of a response's ratio: [1 - clip_low, 1 + clip_high]."""
    aggregation: Aggregation = "sequence_mean"
    correction: Correction = GeometricTis()

    @property
    def no_steps(self) -> str | None:
        return "its one ratio per response would spread a step's advantage over all tokens"

    @model_validator(mode="after")
    def _whole_responses(self) -> GspoConfig:
        if any(rule.level == "token" for rule in self.correction.rules()):
            raise ValueError(
                f"correction.type = {self.correction.type!r} with type = 'gspo': a separate weight "
                "for each token would split the response's ratio again. Use 'geometric_tis', "
                "'geometric_mask', a sequence rule, or 'none'"
            )
        if self.aggregation != "sequence_mean":
            raise ValueError(
                f"aggregation = {self.aggregation!r} with type = 'gspo': the objective is a mean over "
                "responses. Use 'sequence_mean'"
            )
        return self


class Gspo(PolicyGradient[GspoConfig]):
    """GSPO by the formula of the module's docstring."""

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        return group_advantages(rewards.tolist(), group_ids, self.config.normalize_std)

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(self.surrogate_log_ratios(log_ratios, inputs), inputs, self.config)

    def surrogate_log_ratios(self, log_ratios: Tensor, inputs: LossInputs) -> Tensor:
        """Return the mean over the token's response."""
        means = sequence_means(log_ratios, inputs.sequence, inputs.num_sequences)
        return means[inputs.sequence]
