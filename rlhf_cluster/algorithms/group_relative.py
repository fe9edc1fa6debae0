"""Advantages relative to the group, per response or per reasoning step.

    outcome   A_t = (R_i - mean(R)) / (std(R) + 1e-4)         the same for all tokens of response i
    process   A_t = sum over the steps j of response i that end at t or later of
                    (r_ij - mean(r)) / (std(r) + 1e-4)  +  A_t of the outcome rewards alone

R are the rewards of the group, r those of ALL steps of the group (`ScoredRollout.step_rewards`). The
paper trains with one or the other. If a run has rewards of both kinds, each is normalised separately
and the two are added: with equal outcome rewards, or with none, the result is the paper's. Steps of
equal rewards and tokens after the last step get exactly 0.

Shao et al. 2024, arXiv 2402.03300, sections 4.1.2 and 4.1.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal, TypeVar

import numpy as np
from pydantic import model_validator

from rlhf_cluster.algorithms.advantages import group_advantages, process_advantages
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient
from rlhf_cluster.algorithms.policy_gradient_config import PolicyGradientConfig
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup, ScoredRollout


class StepConfig(PolicyGradientConfig):
    """Keys of algorithms whose advantages may come from rewards of reasoning steps."""

    advantage: Literal["outcome", "process"] = "outcome"
    """Rewards that advantages come from. `outcome`: those of whole responses. `process`: those of
    reasoning steps, each token by the steps that end at it or later; needs a reward that scores
    steps."""

    @property
    def no_steps(self) -> str | None:
        if self.advantage == "process":
            return None
        return "advantage = 'outcome' gives every token of a response the same advantage"

    @model_validator(mode="after")
    def _kl_is_no_step(self) -> StepConfig:
        if self.advantage == "process" and self.kl_active and self.kl_in == "reward":
            raise ValueError(
                "kl_in = 'reward' with advantage = 'process': without outcome rewards the KL alone "
                "would be normalised, to the same size whatever kl_coef is. Use kl_in = 'loss'"
            )
        return self


class GroupRelativeConfig(StepConfig):
    """Keys of algorithms that may divide by the group's standard deviation."""

    normalize_std: bool = True
    """Divide the centred rewards by the group's standard deviation."""


S = TypeVar("S", bound=StepConfig)


class GroupRelative(PolicyGradient[S]):
    """Policy gradient with group-relative advantages; subclasses add the `surrogate`."""

    @property
    def normalizes_std(self) -> bool:
        return isinstance(self.config, GroupRelativeConfig) and self.config.normalize_std

    def response_reward(self, scored: ScoredRollout) -> float:
        return scored.outcome_reward if self.config.advantage == "process" else scored.reward

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        return group_advantages(rewards.tolist(), group_ids, self.normalizes_std)

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`.

        Raises:
            RecordError: `advantage = "process"` and a rollout without step rewards, or what
                `PolicyGradient.advantages` raises.
        """
        outcome = super().advantages(groups)
        if self.config.advantage == "outcome":
            return outcome
        scored = [s for g in groups for s in g.scored]
        ends, rewards = zip(*(_get_steps(s) for s in scored), strict=True) if scored else ((), ())
        lengths = [len(s.rollout.response_ids) for s in scored]
        ids = [g.group_id for g in groups for _ in g.scored]
        process = iter(process_advantages(rewards, ends, lengths, ids, self.normalizes_std))
        return [[values + next(process) for values in group] for group in outcome]


def _get_steps(scored: ScoredRollout) -> tuple[np.ndarray, np.ndarray]:
    if scored.step_ends is None or scored.step_rewards is None:
        raise RecordError(
            f"algorithm.advantage = 'process' but rollout {scored.rollout.rollout_id} has no step "
            "rewards. Configure a reward that scores steps"
        )
    return scored.step_ends, scored.step_rewards
