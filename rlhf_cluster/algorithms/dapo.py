"""DAPO: GRPO with a higher upper bound, a token mean, and rules for answers that run too long.

    A_i = (R_i + P(T_i) - mean(group)) / (std(group) + 1e-4)
    J = (1 / sum_i T_i) sum_i sum_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i)

    P(T) = 0 up to L - B tokens, falls linearly to -1 at L, with L = max_response_tokens and
           B = `overlong_buffer_tokens` (soft overlong punishment)

Each of its parts is a key:
- `clip_high`, `aggregation`, `overlong_buffer_tokens`: as above.
- `dynamic_sampling` discards groups whose rewards are all equal and samples others in their place, so
  that every step has `run.groups_per_step` groups with a gradient.
- `overlong_filter` masks answers cut at the limit, in the loss and in its denominators. Their rewards
  still count in their group's mean. If every rollout of a step was cut, none is masked but all
  advantages are 0.

Yu et al. 2025, arXiv 2503.14476.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.advantages import all_equal
from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.group_relative import GroupRelative, GroupRelativeConfig
from rlhf_cluster.algorithms.policy_gradient import clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.records import ExperienceGroup, FinishReason, Rollout, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor


class DapoConfig(ClippedConfig, GroupRelativeConfig):
    """Decoupled clip and dynamic sampling policy optimisation (arXiv 2503.14476)."""

    type: Literal["dapo"] = "dapo"
    group_size: int = Field(default=16, ge=2)
    """Rollouts of one prompt."""
    dynamic_sampling: bool = False
    """Discard groups whose rewards are all equal, and sample others in their place."""
    overlong_filter: bool = False
    """Mask answers that were cut at the limit."""
    overlong_buffer_tokens: int = Field(default=0, ge=0)
    """Number of tokens before the limit over which the reward falls by up to `overlong_penalty`;
    0: no punishment."""
    overlong_penalty: float = Field(default=1.0, gt=0)
    """Reward that an answer at the limit loses. Only with `overlong_buffer_tokens` greater than 0."""

    @model_validator(mode="after")
    def _punishment_is_no_step(self) -> DapoConfig:
        if self.advantage == "process" and self.overlong_buffer_tokens:
            raise ValueError(
                f"overlong_buffer_tokens = {self.overlong_buffer_tokens} with advantage = 'process': "
                "without outcome rewards the punishment alone would be normalised, to the same size "
                "whatever overlong_penalty is. Use 0, or advantage = 'outcome'"
            )
        return self

    def trains_on(self, rewards: Sequence[float]) -> bool:
        return not (self.dynamic_sampling and all_equal(rewards))


class Dapo(GroupRelative[DapoConfig]):
    """DAPO by the formula of the module's docstring."""

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)

    def response_reward(self, scored: ScoredRollout) -> float:
        mask = scored.rollout.response_mask
        # a filtered rollout has no trained token, and keeps its punishment
        return super().response_reward(scored) + self.overlong_punishment(
            int(mask.sum()) or len(mask)
        )

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """Return `GroupRelative.advantages`, with 0 for answers that `overlong_filter` masks."""
        advantages = super().advantages(groups)
        for group, arrays in zip(groups, advantages, strict=True):
            for scored, array in zip(group.scored, arrays, strict=True):
                if self._filtered(scored.rollout):
                    array[:] = 0.0
        return advantages

    def trained_groups(self, groups: Sequence[ExperienceGroup]) -> Sequence[ExperienceGroup]:
        """Return the groups, with the masks of answers cleared that were cut at the limit."""
        rollouts = [s.rollout for g in groups for s in g.scored]
        if all(self._filtered(r) or not r.response_mask.any() for r in rollouts):
            return groups
        return [replace(g, scored=tuple(self._clear_mask(s) for s in g.scored)) for g in groups]

    def overlong_punishment(self, num_tokens: int) -> float:
        """Return the change of the reward for this number of tokens, in [-overlong_penalty, 0].

        Raises:
            ConfigError: a buffer without a limit, or larger than the limit.
        """
        buffer, limit = self.config.overlong_buffer_tokens, self.max_response_tokens
        if not buffer:
            return 0.0
        if limit is None or buffer > limit:
            raise ConfigError(
                f"algorithm.overlong_buffer_tokens = {buffer} with "
                f"generation.max_response_tokens = {limit}: the buffer is its last part. Give the "
                "limit, or lower the buffer"
            )
        over = (num_tokens - (limit - buffer)) / buffer
        return -self.config.overlong_penalty * min(max(over, 0.0), 1.0)

    def _filtered(self, rollout: Rollout) -> bool:
        return self.config.overlong_filter and rollout.finish_reason is FinishReason.LENGTH

    def _clear_mask(self, scored: ScoredRollout) -> ScoredRollout:
        if not self._filtered(scored.rollout):
            return scored
        nothing = np.zeros_like(scored.rollout.response_mask)
        return replace(scored, rollout=replace(scored.rollout, response_mask=nothing))
