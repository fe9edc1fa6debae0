"""PPO: proximal policy optimisation with a learned critic.

    loss_t  = -w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t) - entropy_coef H_t
    value_t = max((V_t - G_t)^2, (clip(V_t, V0_t - value_clip, V0_t + value_clip) - G_t)^2) / 2
    A_t = GAE(discount, trace) of the rewards with the values V0, whitened over the step;  G = A + V0

G uses A before whitening. V0 are the critic's values at the start of the step, V_t its values before
token t at the optimizer step, w_t and r_t as in `policy_gradient`. The response's reward is at its
last trained token, a reasoning step's at the last one of the step, and with `kl_in = "reward"` every
token pays its KL. The value after the last token is 0, also for answers that were cut. The section
`[critic]` configures the critic; a batch has `learner.epochs` times `learner.minibatches` optimizer
steps.

Schulman et al. 2017, arXiv 1707.06347; Schulman et al. 2015, arXiv 1506.02438 (GAE); Ouyang et al.
2022, arXiv 2203.02155 (for language models).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf_cluster.algorithms.advantages import gae, step_rewards, terminal_rewards, whiten
from rlhf_cluster.algorithms.algorithm import (
    LossInputs,
    PerToken,
    Sums,
    ValueInputs,
)
from rlhf_cluster.algorithms.policy_gradient import PolicyGradient, clipped_surrogate
from rlhf_cluster.algorithms.policy_gradient_config import ClippedConfig
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


class PpoConfig(ClippedConfig):
    """Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347)."""

    type: Literal["ppo"] = "ppo"
    group_size: int = Field(default=1, ge=1)
    """Rollouts of one prompt. The critic is the baseline, so one is enough."""
    clip_high: float = Field(default=0.2, gt=0)
    discount: float = Field(default=1.0, gt=0, le=1)
    """gamma: factor of a reward per token that it is earlier."""
    trace: float = Field(default=0.95, ge=0, le=1)
    """lambda of GAE: 1 trusts the rewards alone, 0 the critic's next value alone."""
    whiten: bool = True
    """Whether to scale advantages to mean 0 and deviation 1 over the trained tokens of the step."""
    value_clip: float = Field(default=0.2, ge=0)
    """Distance a value may move in a step before its gradient becomes 0; 0: no clip."""

    @property
    def no_steps(self) -> str | None:
        return None


class Ppo(PolicyGradient[PpoConfig]):
    """PPO; implements `algorithms.algorithm.CriticAlgorithm`."""

    @property
    def needs_critic(self) -> bool:
        return True

    @property
    def zero_advantage_is_zero_loss(self) -> bool:
        return False  # the critic learns from every rollout

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        return clipped_surrogate(log_ratios, inputs, self.config)

    def estimate(
        self, groups: Sequence[ExperienceGroup], values: PerToken
    ) -> tuple[PerToken, PerToken]:
        """Return (advantages, returns), float32, given the value before each response token.

        Raises:
            RecordError: values that do not fit, or a KL in the reward without a reference.
        """
        scored = [s for g in groups for s in g.scored]
        masks = [s.rollout.response_mask for s in scored]
        rewards = [
            terminal_rewards(s.outcome_reward, mask) + step_rewards(s) - self.token_penalties(s)
            for s, mask in zip(scored, masks, strict=True)
        ]
        flat = [v for group in values for v in group]
        advantages, returns = gae(rewards, flat, masks, self.config.discount, self.config.trace)
        if self.config.whiten:
            advantages = whiten(advantages, masks)
        return _nest(advantages, groups), _nest(returns, groups)

    def value_loss(self, inputs: ValueInputs) -> tuple[Tensor, Sums]:
        """Return the value loss of each token [N], not yet weighted, and metric sums."""
        losses, clipped = clipped_value_loss(
            inputs.values, inputs.start_values, inputs.returns, self.config.value_clip
        )
        count = losses.new_tensor(losses.numel())
        return losses, {"critic/clip_fraction": (clipped.sum(), count)}


def clipped_value_loss(
    values: Tensor, start_values: Tensor, returns: Tensor, clip: float
) -> tuple[Tensor, Tensor]:
    """Return half the squared error of each value, the larger of free and clipped.

    Args:
        values: [N], carries the gradient.
        start_values: [N], the critic's at the start of the step.
        returns: [N].
        clip: distance that values may move from `start_values`; 0 for no clip.

    Returns:
        (loss [N], clipped [N] bool: the clipped error is the larger one, so the gradient is zero).

    Raises:
        RecordError: shapes that differ.
    """
    if not values.shape == start_values.shape == returns.shape or values.ndim != 1:
        raise RecordError(
            f"values {list(values.shape)}, start_values {list(start_values.shape)} and returns "
            f"{list(returns.shape)} must all be [N]"
        )
    start_values, returns = start_values.detach(), returns.detach()
    free = (values - returns).square() / 2
    if clip == 0:
        return free, free.new_zeros(free.shape).bool()
    bounded = values.clamp(start_values - clip, start_values + clip)
    bounded_loss = (bounded - returns).square() / 2
    clipped = (bounded_loss > free).detach()
    # `maximum` would take half of each gradient where the two are equal
    return bounded_loss.where(clipped, free), clipped


def _nest(flat: list, groups: Sequence[ExperienceGroup]) -> PerToken:
    values = iter(flat)
    return [[next(values) for _ in group.scored] for group in groups]
