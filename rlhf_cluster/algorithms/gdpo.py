"""GDPO: GRPO with every reward normalised separately.

    loss_t = -w_t min(r_t A, clip(r_t, 1 - clip_low, 1 + clip_high) A)
    S_i = sum_k reward_weights_k (r_ik - mean_k(group)) / (std_k(group) + 1e-4)
    A_i = S_i / std                      over the trained rollouts of the step, whose mean is 0

the same for every token of response i; w_t and r_t as in `policy_gradient`. r_ik is reward k of the
rollout before `scoring.rewards.weight`, whose scale normalisation removes. `reward_weights_k`
defaults to that weight, so that a cost stays a cost. With a single reward of weight 1 it is GRPO,
normalised again over the step.

Liu et al. 2026, arXiv 2601.05242.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.advantages import EQUAL_WITHIN, decoupled_advantages
from rlhf_cluster.algorithms.algorithm import LossInputs, PerToken, Sums
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


class GdpoConfig(ClippedConfig):
    """Group reward-decoupled policy optimisation (Liu et al. 2026, arXiv 2601.05242)."""

    type: Literal["gdpo"] = "gdpo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    reward_weights: dict[str, float] = Field(default_factory=dict)
    """Weight of each normalised reward by name, with the sign of its weight in `scoring.rewards`;
    default: that weight."""
    normalize_std: bool = True
    """Divide every centred reward by its standard deviation in the group."""

    @property
    def no_steps(self) -> str | None:
        return "it normalises every reward separately, and step rewards are recorded as a sum only"

    @model_validator(mode="after")
    def _kl_is_no_reward(self) -> GdpoConfig:
        if self.kl_active and self.kl_in == "reward":
            raise ValueError(
                "kl_in = 'reward' with type = 'gdpo': no single reward exists that the KL could "
                "lower before each is normalised. Use kl_in = 'loss'"
            )
        return self


class Gdpo(PolicyGradient[GdpoConfig]):
    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)

    def advantages(self, groups: Sequence[ExperienceGroup]) -> PerToken:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`.

        Raises:
            RecordError: rollouts whose rewards have different names.
        """
        scored = [s for g in groups for s in g.scored]
        ids = [g.group_id for g in groups for _ in g.scored]
        names = sorted(scored[0].reward_parts) if scored else []
        weights = {name: self.config.reward_weights.get(name, 1.0) for name in names}
        parts = [s.reward_parts for s in scored]
        sums = decoupled_advantages(parts, weights, ids, self.config.normalize_std)
        trained = np.array([s.rollout.response_mask.any() for s in scored], dtype=np.bool_)
        deviation = float(sums[trained].std()) if trained.any() else 0.0
        flat = iter(sums / deviation if deviation > EQUAL_WITHIN else sums)
        return [
            [np.full(len(s.rollout.response_ids), next(flat), dtype=np.float32) for s in g.scored]
            for g in groups
        ]
