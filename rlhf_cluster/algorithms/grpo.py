"""Group-relative policy optimisation with truncated importance sampling.

For a token t of response i with advantage A_i (rewards centred and scaled in the group):

    loss_t = -w_t min(r_t A_i, clip(r_t, 1 - clip_low, 1 + clip_high) A_i) + kl_coef v_t k2_t

    proximal = "recompute":  r = pi / sg(pi),        w = min(sg(pi) / mu, cap)
    proximal = "bypass":     r = min(pi / mu, cap),  w = 1
    v = min(sg(pi) / mu, cap) in both;  k2 = (log pi - log ref)^2 / 2

where pi is the learner, mu the sampler, ref the frozen reference, and sg stops the gradient. The
learner takes one optimizer step a batch, so the current policy IS the proximal one: r is exactly 1
in value, carries the gradient, and is never clipped; w alone handles the distance to the sampler.
In "bypass" the ratio is against the sampler itself: it is the importance weight, clipped like any
ratio and truncated at the cap, which bounds the loss where A is negative (the dual clip of Ye et
al. 2020, arXiv 1912.09729). `correction` of type "none" makes w and v 1 and the cap infinite.
The KL term is k2 because its gradient is that of KL(pi || ref) (see `kl`), weighted by v because
the tokens come from mu.

Shao et al. 2024, arXiv 2402.03300 (GRPO); Hilton et al. 2021, arXiv 2110.00641 (the proximal
policy apart from the sampling one).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, PositiveFloat

from rlhf_cluster.algorithms.advantages import group_advantages
from rlhf_cluster.algorithms.base import LossInputs, Sums
from rlhf_cluster.algorithms.importance import (
    effective_sample_size,
    log_ratio,
    metric_sums,
    truncated_weight,
)
from rlhf_cluster.algorithms.kl import k3, kl_loss
from rlhf_cluster.algorithms.losses import clipped_policy_loss
from rlhf_cluster.config.base import Section
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


class TokenTis(Section):
    """Token-level truncated importance sampling: each token's weight is min(pi_prox / mu, cap)."""

    type: Literal["token_tis"] = "token_tis"
    cap: PositiveFloat = 2.0


class NoCorrection(Section):
    """No off-policy correction."""

    type: Literal["none"] = "none"


class GrpoConfig(Section):
    """Group-relative policy optimisation (Shao et al. 2024, arXiv 2402.03300)."""

    type: Literal["grpo"] = "grpo"
    group_size: int = Field(default=8, ge=2)
    """Rollouts of one prompt."""
    normalize_std: bool = True
    """Divide the centred rewards by the group's standard deviation."""
    clip_low: float = Field(default=0.2, gt=0, lt=1)
    clip_high: float = Field(default=0.28, gt=0)
    """Bounds of the ratio: [1 - clip_low, 1 + clip_high]."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL term to the reference in the loss; needs `scoring.reference = true`."""
    proximal: Literal["recompute", "bypass"] = "recompute"
    """`recompute`: the ratio is against the learner at the start of the step and `correction`
    weights the distance to the sampler. `bypass`: the ratio is against the sampler itself, clipped
    and truncated by `correction`."""
    correction: TokenTis | NoCorrection = Field(default=TokenTis(), discriminator="type")


class Grpo:
    """Implements `algorithms.base.Algorithm`; the formula is in the module's docstring."""

    def __init__(self, config: GrpoConfig) -> None:
        self.config = config

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def needs_reference(self) -> bool:
        return self.config.kl_coef > 0

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """One float32 array [T] per rollout, nested like `groups[i].scored[j]`.

        Every token of a response has the response's advantage. Groups that share an id are one.
        """
        rewards = [s.reward for g in groups for s in g.scored]
        group_ids = [g.group_id for g in groups for _ in g.scored]
        values = iter(group_advantages(rewards, group_ids, self.config.normalize_std))
        return [
            [
                np.full(len(s.rollout.response_ids), next(values), dtype=np.float32)
                for s in group.scored
            ]
            for group in groups
        ]

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """The sum of the token losses, and metric sums.

        Raises:
            RecordError: `kl_coef` is over 0 and there are no reference log-probabilities.
        """
        config, learner = self.config, inputs.learner_logprobs
        cap = config.correction.cap if isinstance(config.correction, TokenTis) else None
        weight = learner.new_ones(learner.shape)
        if cap is not None:
            weight = truncated_weight(learner, inputs.sampled_logprobs, cap)
        recompute = config.proximal == "recompute"
        proximal = learner.detach() if recompute else inputs.sampled_logprobs
        log_ratios = log_ratio(learner, proximal)
        if cap is not None and not recompute:
            log_ratios = log_ratios.clamp(max=math.log(cap))
        policy_loss, clipped = clipped_policy_loss(
            log_ratios, inputs.advantages, config.clip_low, config.clip_high
        )
        loss = (policy_loss * weight if recompute else policy_loss).sum()
        count = clipped.new_tensor(clipped.numel(), dtype=loss.dtype)
        sums = {"learner/clip_fraction": (clipped.sum(), count)}
        if inputs.ref_logprobs is not None:
            reported = k3(learner.detach(), inputs.ref_logprobs)
            sums["learner/kl_ref"] = (reported.sum(), count)
        if config.kl_coef > 0:
            if inputs.ref_logprobs is None:
                raise RecordError(
                    f"algorithm.kl_coef = {config.kl_coef} but the experience has no ref_logprobs. "
                    "Set scoring.reference = true"
                )
            loss = loss + config.kl_coef * (weight * kl_loss(learner, inputs.ref_logprobs)).sum()
        return loss, {**sums, **metric_sums(learner, inputs.sampled_logprobs, cap)}

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are no means, from the reduced ones: the effective sample size."""
        return effective_sample_size(means)
