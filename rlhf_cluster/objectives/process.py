"""Process reward models: the chance that each reasoning step is right, learned, judged and reduced.

    loss      of a step -y log p - (1 - y) log(1 - p), p = sigmoid(logit), y the label in [0, 1]
    reduce    from the steps' p to one score of a response:
              min      the weakest step
              product  the chance that all are right, were they independent
              last     the last step, read as the chance that the answer is right
              mean     what a response of any number of steps is worth a step

Binary labels of steps: Lightman et al. 2023, arXiv 2305.20050 (product; min in its appendix), after
Uesato et al. 2022, arXiv 2211.14275. Soft labels, the share of completions from a step that reach the
right answer: Wang et al. 2023, arXiv 2312.08935 (Math-Shepherd; min).

Promises: one loss a step, not weighted and not summed; nothing broadcasts; a report leaves out no step
that has a label, and says how many responses could not be judged as a whole.

Shapes: N steps of a micro-batch, S steps of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.errors import RecordError
from rlhf_cluster.objectives.report import calibration_error, wilson_interval

if TYPE_CHECKING:
    from torch import Tensor

Reduction = Literal["min", "product", "last", "mean"]


def step_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """[N] binary cross-entropies of logits [N], which carry the gradient, and labels [N] in [0, 1].

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
    """Metric sums of N steps, (sum, count) each. A step whose label is at least `threshold` is right,
    a logit of 0 half an answer."""
    count = losses.new_tensor(losses.numel())
    is_right = labels >= threshold
    agrees = logits.where(is_right, -logits)
    accuracy = (agrees > 0).to(losses.dtype) + (agrees == 0).to(losses.dtype) / 2
    return {
        "process/loss": (losses.sum(), count),
        "process/accuracy": (accuracy.sum(), count),
        "process/label_mean": (labels.sum(), count),
    }


def reduced(scores: np.ndarray, how: Reduction) -> float:
    """One score of a response from its steps' scores [S] in [0, 1], S at least 1."""
    if how == "min":
        return float(scores.min())
    if how == "product":
        return float(scores.prod())
    return float(scores[-1] if how == "last" else scores.mean())


def process_report(
    scores: Sequence[np.ndarray], labels: Sequence[np.ndarray], threshold: float
) -> dict[str, Any]:
    """What a model of steps is worth on held-out responses.

    Args:
        scores: [S] of each response, chances in [0, 1] that its steps are right.
        labels: [S] of each, in [0, 1], NaN where a step has none.
        threshold: a step whose label is at least this counts as right.

    Returns:
        Of labelled steps: `accuracy` with its Wilson interval of 95 % (p over 0.5 says right, 0.5 is
        half an answer; steps of one response are not independent, so that it is narrower than it should
        be), that of the more frequent answer, Brier score against the labels, and `ece`. Of responses:
        `first_error_accuracy`, the share whose first wrong step, or that there is none, is found, with
        its interval; the same of those with an error and of those without, and their harmonic mean
        `first_error_f1` (Zheng et al. 2024, arXiv 2412.06559). A response whose labels do not tell its
        first wrong step counts in `num_unjudged` alone. What is not defined is None.

    Raises:
        RecordError: no labelled step, shapes that differ, or a score outside [0, 1].
    """
    if [len(s) for s in scores] != [len(own) for own in labels]:
        raise RecordError(
            "a report on steps needs one score and one label for each of the same steps"
        )
    all_scores, all_labels = (np.concatenate([np.zeros(0), *each]) for each in (scores, labels))
    if not ((all_scores >= 0) & (all_scores <= 1)).all():
        raise RecordError("scores of steps must be in [0, 1]; a report on the rest would lie")
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
