"""On-policy distillation: the policy samples, a teacher in the scoring pool rates every token.

    J = E_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t)
    A_t = log T(token t) - sg(log pi(token t)) + reward_coef (R_i - mean(group)) / (std(group) + 1e-4)

T is the teacher, pi the policy at the optimizer step; everything else, such as correction weights, is
in `policy_gradient`. In expectation over the sampled token the gradient of the first part is exactly
that of -KL(pi, T) at that token, as long as no ratio is bounded. log pi is the current policy's and
not the sampler's, so staleness and several optimizer steps per batch need only the ratio pi / mu, as
in every policy gradient. The effect of a token on later ones is ignored: each sampled prefix is
learnt by the reverse KL per token. GKD does the same on the student's samples, but over the whole
vocabulary instead of the sampled token.

Agarwal et al. 2023, arXiv 2306.13649 (GKD); Gu et al. 2023, arXiv 2306.08543 (MiniLLM); Lu and Thinking
Machines Lab 2025, "On-Policy Distillation".
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from rlhf_cluster.algorithms.advantages import group_advantages
from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.kl import k3
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor


class OnPolicyDistillationConfig(ClippedConfig):
    """Distillation on the policy's own samples (Agarwal et al. 2023, arXiv 2306.13649)."""

    type: Literal["on_policy_distillation"] = "on_policy_distillation"
    group_size: int = Field(default=1, ge=1)
    """Rollouts of one prompt. The teacher rates each token, so one is enough."""
    reward_coef: float = Field(default=0.0, ge=0)
    """Weight of the reward's advantage in its group, added to the teacher's nats."""

    @property
    def needs_teacher(self) -> bool:
        return True

    @model_validator(mode="after")
    def _rewards_have_a_group(self) -> OnPolicyDistillationConfig:
        if self.reward_coef > 0 and self.group_size == 1:
            raise ValueError(
                f"reward_coef = {self.reward_coef:g} with group_size = 1: a reward's advantage needs "
                "the other rollouts of its group, and there are none. Use a larger group_size"
            )
        if self.kl_active and self.kl_in == "reward":
            raise ValueError(
                "kl_in = 'reward' with type = 'on_policy_distillation': the reward is weighed by "
                "reward_coef, and so would be the KL. Use kl_in = 'loss'"
            )
        return self


class OnPolicyDistillation(PolicyGradient[OnPolicyDistillationConfig]):
    """On-policy distillation. `advantages` has the reward's part only: the teacher's depends on the
    policy's log-probabilities at the optimizer step, so `surrogate` adds it."""

    @property
    def zero_advantage_is_zero_loss(self) -> bool:
        return False

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        coef = self.config.reward_coef
        if coef == 0:
            return np.zeros(len(rewards), dtype=np.float32)
        return coef * group_advantages(rewards.tolist(), group_ids, normalize_std=True)

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """Return the clipped loss of each token [N] with the teacher's advantages, and metric sums.

        Raises:
            RecordError: no teacher log-probabilities.
        """
        if inputs.teacher_logprobs is None:
            raise RecordError(
                "algorithm.type = 'on_policy_distillation' but the experience has no "
                "teacher_logprobs. Set scoring.teacher"
            )
        learner, teacher = inputs.learner_logprobs.detach(), inputs.teacher_logprobs.detach()
        gap = learner - teacher
        rated = replace(inputs, advantages=inputs.advantages - gap)
        losses, sums = clipped_surrogate(log_ratios, rated, self.config)
        count = losses.new_tensor(losses.numel())
        return losses, {
            **sums,
            "distillation/teacher_gap": (gap.sum(), count),
            "distillation/teacher_kl": (k3(learner, teacher).sum(), count),
        }
