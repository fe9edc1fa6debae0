"""GRPO with truncated importance sampling.

stub
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat

from rlhf_cluster.config.base import Section


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
    handles the distance to the sampler. `bypass`: the ratio is against the sampler itself."""
    correction: TokenTis | NoCorrection = Field(default=TokenTis(), discriminator="type")


class Grpo:
    def __init__(self, config: GrpoConfig) -> None:
        self.config = config
