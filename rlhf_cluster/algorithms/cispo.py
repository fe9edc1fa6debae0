"""CISPO: REINFORCE whose weight is the clipped ratio, so that no token loses its gradient.

    J = E_t sg(clip(r_t, 1 - clip_low, 1 + clip_high)) A_i log pi_t

A clipped surrogate drops the tokens that move most, the rare ones at which an answer turns. CISPO
bounds their weight and keeps their gradient. With `clip_low = 1` the ratio has no lower bound, as
published. With `proximal = "bypass"` the clipped ratio already is the truncated importance weight,
so a token rule that truncates may not be narrower, and changes nothing. Advantages are those of
GRPO. MiniMax 2025, arXiv 2506.13585; the upper bound of 5: Khatri et al. 2025, arXiv
2510.13786.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from rlhf_cluster.algorithms.algorithm import LossInputs, Sums
from rlhf_cluster.algorithms.group_relative import GroupRelative, GroupRelativeConfig
from rlhf_cluster.algorithms.policy_losses import cispo_policy_loss

if TYPE_CHECKING:
    from torch import Tensor


class CispoConfig(GroupRelativeConfig):
    """Clipped importance-sampling policy optimisation (MiniMax 2025, arXiv 2506.13585)."""

    type: Literal["cispo"] = "cispo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    clip_low: float = Field(default=1.0, gt=0, le=1)
    """Distance from 1 to the lower bound of the weight. 1: no lower bound."""
    clip_high: float = Field(default=4.0, gt=0)
    """Bounds of the weight: [1 - clip_low, 1 + clip_high]."""

    @model_validator(mode="after")
    def _one_truncation(self) -> CispoConfig:
        low, high = 1 - self.clip_low, 1 + self.clip_high
        for rule in self.correction.rules():
            narrower = rule.low > low or rule.high < high
            if self.proximal == "bypass" and rule.action == "truncate" and narrower:
                raise ValueError(
                    f"{self.correction_key} bounds the ratio to [{rule.low:g}, "
                    f"{rule.high:g}], with type = 'cispo', proximal = 'bypass' and a weight of "
                    f"[{low:g}, {high:g}]: they bound the same weight, and clip_low or clip_high would "
                    "never act. Use correction = { type = 'none' } or a rule that masks, or bounds no "
                    "narrower than the weight's"
                )
        return self


class Cispo(GroupRelative[CispoConfig]):
    """CISPO by the formula of the module's docstring."""

    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        losses, clipped = cispo_policy_loss(
            log_ratios,
            inputs.learner_logprobs,
            inputs.advantages,
            self.config.clip_low,
            self.config.clip_high,
        )
        count = losses.new_tensor(losses.numel())
        return losses, {"learner/clip_fraction": (clipped.sum(), count)}

    def truncation(self, ratios: Tensor, low: float, high: float) -> Tensor:
        """Return 1: the clip has already bounded the weight, at least as tightly."""
        return ratios.new_ones(ratios.shape)
