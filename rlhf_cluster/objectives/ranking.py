"""Reward-model losses: pure functions from scores of whole responses to one loss an example.

    bradley_terry    -(1 - e) s(d) - e s(-d) + c (s_w + s_l)^2      d = s_w - s_l - margin
    plackett_luce    sum over ranks k of logsumexp(s_k .. s_K) - s_k      best first
    pointwise        bce: of a logit against a label in [0, 1]; mse: (s - target)^2, both an example,
                     or a mean over the heads that are labelled

Promises: one loss an example, not weighted and not summed, so that a caller's sum depends on no
micro-batch; shapes are checked, nothing broadcasts; masked entries may hold anything, NaN too, and
get no gradient.

Shapes: P pairs, G rankings of at most K responses, N responses, H heads.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> Tensor:
    """[P]. Bradley and Terry 1952; as a reward-model loss Stiennon et al. 2020, arXiv 2009.01325.

    Args:
        chosen, rejected: [P] scores, carry the gradient.
        margins: [P] by how much the chosen response should lead (Touvron et al. 2023, arXiv
            2307.09288, Llama 2).
        label_smoothing: share of pairs held to be labelled the wrong way round, in [0, 0.5).
        centring: weight of (chosen + rejected)^2, which fixes the free constant of the scores at a
            mean of 0 (Eisenstein et al. 2023, arXiv 2312.09244).

    Raises:
        RecordError: shapes that differ.
    """
    from torch.nn.functional import logsigmoid

    _same_shape(1, chosen=chosen, rejected=rejected, margins=margins)
    lead = chosen - rejected
    if margins is not None:
        lead = lead - margins.detach()
    losses = -(1 - label_smoothing) * logsigmoid(lead) - label_smoothing * logsigmoid(-lead)
    return losses + centring * (chosen + rejected).square()


def plackett_luce_loss(scores: Tensor, mask: Tensor) -> Tensor:
    """[G]: negative log-likelihood of the whole order. Plackett 1975, Luce 1959; listwise: Xia 2008.

    With two responses it is `bradley_terry_loss`. Divide by nothing: an order of K holds K - 1
    choices, and counts as many.

    Args:
        scores: [G, K] best first, carry the gradient.
        mask: [G, K] bool, True from the left for the responses that are there.

    Raises:
        RecordError: shapes that differ, or a mask with a hole.
    """
    _same_shape(2, scores=scores, mask=mask)
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise RecordError("a ranking has a hole: mask must be True from the left, then False")
    shown = scores.where(mask, 0.0)
    own = mask.new_ones(mask.shape[1], mask.shape[1])  # [K, K]: from rank k on
    behind = own.triu() & mask[:, None, :] | own.triu().tril()
    tails = shown[:, None, :].masked_fill(~behind, float("-inf")).logsumexp(-1)
    return (tails - shown).where(mask, 0.0).sum(-1)


def pointwise_loss(
    scores: Tensor, targets: Tensor, kind: Literal["bce", "mse"], mask: Tensor | None = None
) -> Tensor:
    """[N]: of each response, a mean over its labelled heads; 0 for one without any.

    Args:
        scores: [N] or, with several heads, [N, H]; carry the gradient. Logits with `bce`.
        targets: the same shape; labels in [0, 1] with `bce`.
        mask: the same shape, bool: True where there is a target (Wang et al. 2023, arXiv 2311.09528:
            helpfulness, correctness and so on, one head each).

    Raises:
        RecordError: shapes that differ.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits

    _same_shape(
        scores.ndim if scores.ndim in (1, 2) else 1, scores=scores, targets=targets, mask=mask
    )
    targets = targets.detach()
    if mask is not None:
        mask = mask.bool()
        scores, targets = scores.where(mask, 0.0), targets.where(mask, 0.0)
    if kind == "bce":
        losses = binary_cross_entropy_with_logits(scores, targets, reduction="none")
    else:
        losses = (scores - targets).square()
    if mask is not None:
        losses = losses.where(mask, 0.0)
    if losses.ndim == 1:
        return losses
    heads = losses.new_tensor(losses.shape[1]) if mask is None else mask.sum(-1).clamp(min=1)
    return losses.sum(-1) / heads


def pair_score_metrics(losses: Tensor, chosen: Tensor, rejected: Tensor) -> Sums:
    """Metric sums of scored pairs, (sum, count) each; equal scores count as half right."""
    count = losses.new_tensor(losses.numel())
    margins = chosen - rejected
    right = (margins > 0).to(losses.dtype) + (margins == 0).to(losses.dtype) / 2
    return {
        "ranking/loss": (losses.sum(), count),
        "ranking/accuracy": (right.sum(), count),
        "ranking/margin": (margins.sum(), count),
        "ranking/score_mean": ((chosen + rejected).sum() / 2, count),
    }


def ranking_score_metrics(losses: Tensor, scores: Tensor, mask: Tensor) -> Sums:
    """As `pair_score_metrics`, over all pairs of a ranking: scores [G, K] best first, mask [G, K]."""
    count = losses.new_tensor(losses.numel())
    ranks = scores.shape[1]
    pairs = (mask[:, :, None] & mask[:, None, :]) & mask.new_ones(ranks, ranks).triu(1)
    margins = (scores[:, :, None] - scores[:, None, :])[pairs]
    right = (margins > 0).to(losses.dtype) + (margins == 0).to(losses.dtype) / 2
    num_pairs = losses.new_tensor(margins.numel())
    return {
        "ranking/loss": (losses.sum(), count),
        "ranking/accuracy": (right.sum(), num_pairs),
        "ranking/margin": (margins.sum(), num_pairs),
        "ranking/score_mean": (scores[mask].sum(), mask.sum()),
    }


def _same_shape(ndim: int, **tensors: Tensor | None) -> None:
    shapes = {name: tuple(t.shape) for name, t in tensors.items() if t is not None}
    if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != ndim:
        found = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise RecordError(f"all must have one shape of {ndim} dimensions; found {found}")
