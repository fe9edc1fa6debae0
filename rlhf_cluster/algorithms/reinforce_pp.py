"""REINFORCE++: no critic, no group needed, advantages normalised over the whole batch.

    loss_t = -w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    G_t = sum over trained tokens s >= t of (reward at s - coef KL_s)
    A_t = (G_t - mean) / std             over the trained tokens of ALL rollouts of the step

The response's reward is at its last trained token, a reasoning step's at the last one of the step.
coef KL_s applies with `kl_in = "reward"`. With `baseline = "group"` the mean reward of the prompt's
rollouts is subtracted from the response's first. w_t and r_t as in `policy_gradient`.

Hu et al. 2025, arXiv 2501.03262.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.advantages import (
    group_advantages,
    step_rewards,
    terminal_rewards,
    whiten,
)
from rlhf_cluster.algorithms.algorithm import LossInputs, PerToken, Sums
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


class ReinforcePpConfig(ClippedConfig):
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262)."""

    type: Literal["reinforce_pp"] = "reinforce_pp"
    group_size: int = Field(default=1, ge=1)
    """Rollouts of one prompt."""
    clip_high: float = Field(default=0.2, gt=0)
    baseline: Literal["none", "group"] = "none"
    """Value subtracted from the rewards before they are normalised over the batch."""

    @property
    def no_steps(self) -> str | None:
        return None

    @model_validator(mode="after")
    def _baseline_has_a_group(self) -> ReinforcePpConfig:
        if self.baseline == "group" and self.group_size == 1:
            raise ValueError(
                "baseline = 'group' with group_size = 1: every reward is its own mean, so all "
                "advantages would be 0. Use larger groups, or baseline = 'none'"
            )
        return self


class ReinforcePp(PolicyGradient[ReinforcePpConfig]):
    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)

    def advantages(self, groups: Sequence[ExperienceGroup]) -> PerToken:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`."""
        scored = [s for g in groups for s in g.scored]
        masks = [s.rollout.response_mask for s in scored]
        outcomes = [s.outcome_reward for s in scored]
        if self.config.baseline == "group":
            ids = [g.group_id for g in groups for _ in g.scored]
            totals = np.array([s.reward for s in scored])
            centred = group_advantages(totals.tolist(), ids, normalize_std=False)
            outcomes = (outcomes + centred - totals).tolist()
        returns = [
            _rewards_to_go(
                terminal_rewards(outcome, mask) + step_rewards(s) - self.token_penalties(s)
            )
            for s, outcome, mask in zip(scored, outcomes, masks, strict=True)
        ]
        flat = iter(whiten(returns, masks))
        return [[next(flat) for _ in group.scored] for group in groups]


def _rewards_to_go(rewards: np.ndarray) -> np.ndarray:
    """Sum the rewards from each token onward. [T] -> [T]."""
    return rewards[::-1].cumsum()[::-1]
