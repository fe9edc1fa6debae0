"""REINFORCE with a leave-one-out baseline.

    loss_t = -w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    A_i = reward_i - mean reward of the OTHER rollouts of the prompt

the same for every token of response i; w_t and r_t as in `policy_gradient`. The baseline does not
contain the response it is subtracted from, so it is unbiased, without a learned value and without
dividing by a standard deviation. The gradient is that of the expected reward, up to a factor, with
`aggregation = "fixed_length"`; the other aggregations divide by lengths that were sampled, which
tilts it. With one optimizer step per batch r_t is exactly 1 in value and the loss is REINFORCE's;
the clip acts when `learner.epochs` or `learner.minibatches` is greater than 1.

Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline
for free!".
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from rlhf_cluster.algorithms.advantages import leave_one_out_advantages
from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig

if TYPE_CHECKING:
    from torch import Tensor


class RlooConfig(ClippedConfig):
    """REINFORCE with a leave-one-out baseline (Ahmadian et al. 2024, arXiv 2402.14740)."""

    type: Literal["rloo"] = "rloo"
    group_size: int = Field(default=4, ge=2)
    """Rollouts of one prompt."""
    clip_high: float = Field(default=0.2, gt=0)


class Rloo(PolicyGradient[RlooConfig]):
    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        return leave_one_out_advantages(rewards.tolist(), group_ids)
