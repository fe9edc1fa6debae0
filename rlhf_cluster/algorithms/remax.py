"""ReMax: REINFORCE with the reward of the greedy answer as baseline.

    loss_t = -w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    A_i = reward_i - reward of the greedy response to the same prompt

the same for every token of response i; w_t and r_t as in `policy_gradient`. The greedy response is
generated and scored with its group and never trained. It depends on the prompt alone, so the baseline
is unbiased, whichever version generated it. The gradient is that of the expected reward, up to a
factor, with `aggregation = "fixed_length"`; the other aggregations divide by lengths that were
sampled. With one optimizer step per batch r_t is exactly 1 in value and the loss is REINFORCE's. A KL
in the reward lowers reward_i only.

Li et al. 2023, arXiv 2310.10505.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from rlhf_cluster.algorithms.algorithm import LossInputs, PerToken, Sums
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


class RemaxConfig(ClippedConfig):
    """ReMax (Li et al. 2023, arXiv 2310.10505)."""

    type: Literal["remax"] = "remax"
    group_size: int = Field(default=1, ge=1)
    """Sampled rollouts of one prompt; the greedy response is an additional one."""
    clip_high: float = Field(default=0.2, gt=0)


class Remax(PolicyGradient[RemaxConfig]):
    @property
    def needs_greedy(self) -> bool:
        return True

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)

    def advantages(self, groups: Sequence[ExperienceGroup]) -> PerToken:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`.

        Raises:
            RecordError: a group without a greedy reward.
        """
        return [self._group_advantages(group) for group in groups]

    def _group_advantages(self, group: ExperienceGroup) -> list[np.ndarray]:
        if group.greedy_reward is None:
            raise RecordError(
                f"group {group.group_id} has no greedy reward; ReMax needs one for every prompt "
                "(Sampling.greedy_baseline)"
            )
        advantages = []
        for scored in group.scored:
            reward = scored.reward - float(self.token_penalties(scored).sum())
            length = len(scored.rollout.response_ids)
            advantages.append(np.full(length, reward - group.greedy_reward, dtype=np.float32))
        return advantages
