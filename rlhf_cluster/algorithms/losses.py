"""Token losses: pure functions of tensors, one value a token, summed by the caller.

Shapes: N trained tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor


def clipped_policy_loss(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """The clipped objective, negated, one value a token (Schulman et al. 2017, arXiv 1707.06347).

        -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A),   r = exp(log_ratio)

    Unequal bounds are those of DAPO (Yu et al. 2025, arXiv 2503.14476).

    Args:
        log_ratio: [N], carries the gradient.
        advantages: [N].

    Returns:
        (loss [N], clipped [N] bool: where the bound was taken, so that the gradient is zero).

    Raises:
        RecordError: shapes that differ.
    """
    if log_ratio.shape != advantages.shape or log_ratio.ndim != 1:
        raise RecordError(
            f"log_ratio {list(log_ratio.shape)} and advantages {list(advantages.shape)} must both "
            "be [N]"
        )
    ratio = log_ratio.exp()
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return -free.minimum(bounded), (bounded < free).detach()


def masked_sum(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over the mask, number of entries in the mask): numerator and denominator of one mean.

    Masked entries may hold anything, NaN too, and get no gradient.

    Raises:
        RecordError: shapes that differ.
    """
    if values.shape != mask.shape:
        raise RecordError(
            f"values {list(values.shape)} and mask {list(mask.shape)} must have one shape"
        )
    return values[mask.bool()].sum(), mask.sum()
