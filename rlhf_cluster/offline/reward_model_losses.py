"""Reward-model losses for responses and for reasoning steps, and the report on step models.

Whole responses:

    bradley_terry    -(1 - e) s(d) - e s(-d) + c (s_w + s_l)^2      d = s_w - s_l - margin
    plackett_luce    sum over ranks k of logsumexp(s_k .. s_K) - s_k      best first
    pointwise        bce: a logit against a label in [0, 1]; mse: (s - target)^2; per example,
                     or a mean over the heads that are labelled

Process reward models estimate the probability that each reasoning step is right:

    loss      per step -y log p - (1 - y) log(1 - p), p = sigmoid(logit), y the label in [0, 1]
    reduce    from the steps' p to one score of a response (`data.reasoning_steps.reduced`):
              min      the weakest step
              product  the probability that all are right, if they were independent
              last     the last step, read as the probability that the answer is right
              mean     the mean over the steps, comparable between numbers of steps

Binary labels of steps: Lightman et al. 2023, arXiv 2305.20050 (product; min in its appendix),
after Uesato et al. 2022, arXiv 2211.14275. Soft labels, the share of completions from a step that
reach the right answer: Wang et al. 2023, arXiv 2312.08935 (Math-Shepherd; min).

Promises:
- one loss per example or step, not weighted and not summed, so a caller's sum does not depend on
  micro-batches;
- shapes are checked, nothing broadcasts; masked entries may hold anything, NaN too, and get no
  gradient;
- a report omits no step that has a label, and says how many responses could not be judged as a
  whole.

Shapes: P pairs, G rankings of at most K responses, N responses or steps of a micro-batch, H heads,
S steps of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.errors import RecordError
from rlhf_cluster.offline.scorer_report import (
    calibration_error,
    wilson_interval,
)

if TYPE_CHECKING:
    from torch import Tensor


def bradley_terry_loss(
    chosen: Tensor,
    rejected: Tensor,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
    centring: float = 0.0,
) -> Tensor:
    """Return the Bradley-Terry loss of each pair, [P].

    Bradley and Terry 1952; as a reward-model loss Stiennon et al. 2020, arXiv 2009.01325.

    Args:
        chosen, rejected: [P] scores, carry the gradient.
        margins: [P] lead that the chosen response should have (Touvron et al. 2023, arXiv
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
    """Return the negative log-likelihood of each whole order, [G].

    Plackett 1975, Luce 1959; listwise: Xia 2008. With two responses it is `bradley_terry_loss`. It is
    not divided by the length: an order of K responses holds K - 1 choices, and weighs as many.

    Args:
        scores: [G, K] best first, carry the gradient.
        mask: [G, K] bool, True from the left for the responses that exist.

    Raises:
        RecordError: shapes that differ, or a mask with a hole.
    """
    _same_shape(2, scores=scores, mask=mask)
    mask = mask.bool()
    if bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise RecordError("a ranking has a hole: mask must be True from the left, then False")
    shown = scores.where(mask, 0.0)
    own = mask.new_ones(mask.shape[1], mask.shape[1])  # [K, K]: row k has rank k and all behind it
    behind = own.triu() & mask[:, None, :] | own.triu().tril()
    tails = shown[:, None, :].masked_fill(~behind, float("-inf")).logsumexp(-1)
    return (tails - shown).where(mask, 0.0).sum(-1)


def pointwise_loss(
    scores: Tensor, targets: Tensor, kind: Literal["bce", "mse"], mask: Tensor | None = None
) -> Tensor:
    """Return the loss of each response, [N]: a mean over its labelled heads, 0 without any.

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
    """Return metric sums of scored pairs, (sum, count) each. Equal scores are half right."""
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
    """Return the sums of `pair_score_metrics` over all pairs within each ranking.

    Args:
        scores: [G, K], best first.
        mask: [G, K] bool, True for the responses that exist.
    """
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


def step_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the binary cross-entropy of each step, [N].

    Args:
        logits: [N], carry the gradient.
        labels: [N] in [0, 1].

    Raises:
        RecordError: shapes that differ.
    """
    from torch.nn.functional import binary_cross_entropy_with_logits

    if logits.ndim != 1 or logits.shape != labels.shape:
        raise RecordError(
            f"one logit and one label a step; found {list(logits.shape)} and {list(labels.shape)}"
        )
    return binary_cross_entropy_with_logits(logits, labels.detach(), reduction="none")


def step_metrics(losses: Tensor, logits: Tensor, labels: Tensor, threshold: float) -> Sums:
    """Return metric sums of N steps, (sum, count) each.

    A step whose label is at least `threshold` is right. A logit of 0 is half right.
    """
    count = losses.new_tensor(losses.numel())
    is_right = labels >= threshold
    agrees = logits.where(is_right, -logits)
    accuracy = (agrees > 0).to(losses.dtype) + (agrees == 0).to(losses.dtype) / 2
    return {
        "process/loss": (losses.sum(), count),
        "process/accuracy": (accuracy.sum(), count),
        "process/label_mean": (labels.sum(), count),
    }


def process_report(
    scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], threshold: float
) -> dict[str, Any]:
    """Measure the quality of a model of steps on held-out responses.

    Args:
        scores: one array [S] per response, chances in [0, 1] that its steps are right.
        labels: one array [S] per response, in [0, 1], NaN where a step has none.
        threshold: least label of a step that is right.

    Returns:
        Numbers by name. One that is not defined is None.

        Over labelled steps: `accuracy` with its Wilson interval of 95 %, the accuracy of always giving
        the more frequent answer, the Brier score against the labels, and `ece`. p above 0.5 says right,
        and 0.5 is half right. Steps of one response are not independent, so the interval is narrower
        than it should be.

        Over responses: `first_error_accuracy` with its interval, the share whose first wrong step is
        found, or found to be missing; that share among responses with an error and among those without;
        and the harmonic mean of these two, `first_error_f1` (Zheng et al. 2024, arXiv 2412.06559). A
        response whose labels do not determine its first wrong step is in `num_unjudged` alone.

    Raises:
        RecordError: no labelled step, shapes that differ, or a score outside [0, 1].
    """
    if [len(s) for s in scores] != [len(own) for own in labels]:
        raise RecordError(
            "a report on steps needs one score and one label for each of the same steps"
        )
    all_scores, all_labels = (np.concatenate([np.zeros(0), *each]) for each in (scores, labels))
    if not ((all_scores >= 0) & (all_scores <= 1)).all():
        raise RecordError("scores of steps must be in [0, 1]; a report on the rest would mislead")
    there = ~np.isnan(all_labels)
    if not there.any():
        raise RecordError("a report on steps needs at least one labelled step, found none")
    p, y = all_scores[there], all_labels[there]
    is_right = y >= threshold
    hit = np.where(p == 0.5, 0.5, (p > 0.5) == is_right)
    low, high = wilson_interval(float(hit.sum()), hit.size)
    return {
        "num_responses": len(scores),
        "num_steps": int(hit.size),
        "accuracy": float(hit.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "accuracy_of_majority": float(max(is_right.mean(), 1 - is_right.mean())),
        "brier": float(np.square(p - y).mean()),
        "ece": calibration_error(np.maximum(p, 1 - p), hit),
        **_first_errors(scores, labels, threshold),
    }


def _first_errors(
    scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], threshold: float
) -> dict[str, Any]:
    found: dict[bool, list[float]] = {True: [], False: []}  # by whether there is an error
    for own, truth in zip(scores, labels, strict=True):
        wrong = _first(truth < threshold)
        if np.isnan(truth[: len(truth) if wrong is None else wrong]).any():
            continue
        found[wrong is not None].append(float(_first(own < 0.5) == wrong))
    judged = [*found[True], *found[False]]
    shares = {has: float(np.mean(own)) if own else None for has, own in found.items()}
    low, high = wilson_interval(sum(judged), len(judged)) if judged else (None, None)
    with_error, without = shares[True], shares[False]
    harmonic = None
    if with_error is not None and without is not None:
        total = with_error + without
        harmonic = 2 * with_error * without / total if total else 0.0
    return {
        "num_unjudged": len(scores) - len(judged),
        "first_error_accuracy": float(np.mean(judged)) if judged else None,
        "first_error_low": low,
        "first_error_high": high,
        "first_error_with_error": with_error,
        "first_error_without_error": without,
        "first_error_f1": harmonic,
    }


def _first(where: np.ndarray) -> int | None:
    places = np.flatnonzero(where)
    return int(places[0]) if len(places) else None
