"""Reports on trained scorers over held-out pairs: of one scorer, and of an ensemble.

Pure numpy, no torch. The report on one scorer:

    accuracy      share of pairs whose chosen response scores higher; a tie is half a hit; with the
                  Wilson interval of 95 % (Wilson 1927)
    brier         mean of (1 - p)^2, p = sigmoid(chosen - rejected) (Brier 1950); 0.25 is a coin
    ece           expected calibration error: |confidence - accuracy| over equal bins of the confidence
                  max(p, 1 - p), weighted by pairs (Guo et al. 2017, arXiv 1706.04599); `reliability`
                  has the bins themselves
    length_correlation    Spearman's rank correlation of score and length over all responses; above
                  `LENGTH_WARNING` the scorer may reward length itself

The report on M scorers of the same pairs, alone and together:

    members       the report on each of them
    ensemble      the report on the mean of their scores
    disagreement  score_std: standard deviation of the members' scores of one response, a mean over all
                  responses; split_fraction: share of pairs on which not all members choose alike; and
                  the ensemble's accuracy on those, and on the others

Members have separate scales: one whose scores spread more weighs more in the mean. `spread` gives
the standard deviation of each member over all responses.

Promises:
- pairs in any order give the same report, and every pair is used: scores that are not finite are
  refused, and members that scored other pairs too;
- an undefined figure, such as the correlation with a constant, is None.

Shapes: P pairs, M members, N numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rlhf_cluster.errors import RecordError

LENGTH_WARNING = 0.3

Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True, kw_only=True)
class Bin:
    """One bin of a reliability diagram: pairs of similar confidence. Empty bins do not exist."""

    num_pairs: int
    confidence: float  # their mean
    accuracy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Numbers of one scorer on held-out pairs; see the module."""

    num_pairs: int
    num_ties: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    brier: float
    ece: float
    reliability: tuple[Bin, ...]
    margin_mean: float
    length_correlation: float | None
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Return the numbers as values that JSON can hold."""
        listed = {
            "warnings": list(self.warnings),
            "reliability": [asdict(b) for b in self.reliability],
        }
        return {**asdict(self), **listed}


def validation_report(
    chosen: np.ndarray,
    rejected: np.ndarray,
    chosen_lengths: np.ndarray,
    rejected_lengths: np.ndarray,
    num_bins: int = 10,
) -> Report:
    """Return the report on scored pairs.

    Args:
        chosen, rejected: [P] scores, finite.
        chosen_lengths, rejected_lengths: [P] tokens of the responses.
        num_bins: number of bins of the calibration error, over confidences from 0.5 to 1.

    Raises:
        RecordError: no pairs, lengths that differ, or a score that is not finite.
    """
    arrays = [np.asarray(a, dtype=np.float64) for a in (chosen, rejected)]
    lengths = [np.asarray(a) for a in (chosen_lengths, rejected_lengths)]
    if (
        len({a.shape for a in (*arrays, *lengths)}) != 1
        or arrays[0].ndim != 1
        or not arrays[0].size
    ):
        shapes = ", ".join(str(list(a.shape)) for a in (*arrays, *lengths))
        raise RecordError(f"a report needs scores and lengths of the same pairs, found {shapes}")
    if bad := int(sum((~np.isfinite(a)).sum() for a in arrays)):
        raise RecordError(
            f"{bad} of {2 * arrays[0].size} scores are not finite; a report on the rest would mislead"
        )
    margins = arrays[0] - arrays[1]
    right = np.where(margins > 0, 1.0, np.where(margins < 0, 0.0, 0.5))
    low, high = wilson_interval(float(right.sum()), right.size)
    correlation = spearman(np.concatenate(arrays), np.concatenate(lengths))
    confidences = _sigmoid(np.abs(margins))
    return Report(
        num_pairs=int(margins.size),
        num_ties=int((margins == 0).sum()),
        accuracy=float(right.mean()),
        accuracy_low=low,
        accuracy_high=high,
        brier=float(np.mean(np.square(_sigmoid(-margins)))),
        ece=calibration_error(confidences, right, num_bins),
        reliability=reliability_bins(confidences, right, num_bins),
        margin_mean=float(margins.mean()),
        length_correlation=correlation,
        warnings=_warnings(low, high, correlation),
    )


def graded_report(scores: np.ndarray, grades: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """Compare scores of single responses with their grades.

    Args:
        scores: [N] grades that the scorer predicts, finite.
        grades: [N] NaN where a response has none.
        lengths: [N] tokens of the responses.

    Returns:
        Over the graded responses: `mean_squared_error`; `variance` of the grades, which is the error of
        always predicting their mean; and `spearman` of score and grade. Over all responses:
        `length_correlation` of score and length, with a warning above `LENGTH_WARNING`.

    Raises:
        RecordError: lengths that differ, or a score that is not finite.
    """
    if not scores.shape == grades.shape == lengths.shape or not np.isfinite(scores).all():
        raise RecordError("a report on grades needs one finite score, grade and length a response")
    there = ~np.isnan(grades)
    said, given = scores[there], grades[there]
    correlation = spearman(scores, lengths)
    return {
        "num_graded": int(there.sum()),
        "mean_squared_error": float(np.square(said - given).mean()) if there.any() else None,
        "variance": float(given.var()) if there.any() else None,
        "spearman": spearman(said, given),
        "length_correlation": correlation,
        "warnings": _length_warnings(correlation),
    }


def wilson_interval(successes: float, num: int, z: float = Z_95) -> tuple[float, float]:
    """Return (low, high) of a share, never outside [0, 1]. Wilson 1927. `num` is at least 1."""
    share, squared = successes / num, z * z
    centre = (share + squared / (2 * num)) / (1 + squared / num)
    half = (
        z / (1 + squared / num) * math.sqrt(share * (1 - share) / num + squared / (4 * num * num))
    )
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(confidences: np.ndarray, right: np.ndarray, num_bins: int = 10) -> float:
    """Return the ECE of confidences [P] in [0.5, 1] and outcomes [P] in [0, 1], over equal bins."""
    bins = reliability_bins(confidences, right, num_bins)
    return sum(b.num_pairs * abs(b.confidence - b.accuracy) for b in bins) / confidences.size


def reliability_bins(
    confidences: np.ndarray, right: np.ndarray, num_bins: int = 10
) -> tuple[Bin, ...]:
    """Sort confidences [P] in [0.5, 1] and outcomes [P] in [0, 1] into equal bins, least sure first."""
    places = np.minimum(((confidences - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    return tuple(
        Bin(
            num_pairs=int(own.sum()),
            confidence=float(confidences[own].mean()),
            accuracy=float(right[own].mean()),
        )
        for own in (places == place for place in range(num_bins))
        if own.any()
    )


def spearman(first: np.ndarray, second: np.ndarray) -> float | None:
    """Return the rank correlation of [N] and [N], ties at their mean rank; None if one is constant."""
    ranks = [_ranks(np.asarray(a, dtype=np.float64)) for a in (first, second)]
    centred = [r - r.mean() for r in ranks]
    norm = math.sqrt(float(np.square(centred[0]).sum()) * float(np.square(centred[1]).sum()))
    return float((centred[0] * centred[1]).sum() / norm) if norm > 0 else None


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def _sigmoid(values: np.ndarray) -> np.ndarray:
    ends = np.exp(-np.abs(values))
    return np.where(values >= 0, 1 / (1 + ends), ends / (1 + ends))


def _warnings(low: float, high: float, correlation: float | None) -> tuple[str, ...]:
    found = []
    if low <= 0.5 <= high:
        found.append(
            f"the accuracy's interval [{low:.3f}, {high:.3f}] holds 0.5: these pairs do not tell the "
            "scorer from a coin"
        )
    return (*found, *_length_warnings(correlation))


def _length_warnings(correlation: float | None) -> list[str]:
    if correlation is None or abs(correlation) <= LENGTH_WARNING:
        return []
    kind = "longer" if correlation > 0 else "shorter"
    return [
        f"score and length have a rank correlation of {correlation:.2f}, over {LENGTH_WARNING}: the "
        f"scorer may prefer {kind} responses as such. Balance lengths in the data"
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One scorer's scores of held-out pairs."""

    scores: np.ndarray  # [P, 2] float64, the chosen response's and the rejected one's
    lengths: np.ndarray  # [P, 2] tokens of the responses
    paraphrased: np.ndarray | None = (
        None  # [P, 2] the same of paraphrases, NaN where there are none
    )

    def report(self) -> dict[str, Any]:
        """Return the report on this scorer alone."""
        report = validation_report(*self.scores.T, *self.lengths.T).as_dict()
        if self.paraphrased is not None:
            report["paraphrases"] = paraphrase_report(self.scores, self.paraphrased)
        return report

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as values that JSON can hold."""
        rows = None if self.paraphrased is None else self.paraphrased.tolist()
        if rows is not None:
            rows = [row if all(value == value for value in row) else None for row in rows]
        return {
            "scores": self.scores.tolist(),
            "lengths": self.lengths.tolist(),
            "paraphrased": rows,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scored:
        """Build the scores from the values of `as_dict`."""
        rows = values["paraphrased"]
        if rows is not None:
            rows = np.array([row or (np.nan, np.nan) for row in rows], dtype=np.float64)
        return cls(
            scores=np.array(values["scores"], dtype=np.float64),
            lengths=np.array(values["lengths"]),
            paraphrased=rows,
        )


def paraphrase_report(scores: np.ndarray, paraphrased: np.ndarray) -> dict[str, Any] | None:
    """Measure how often the verdict on a pair is the same for paraphrases of its responses.

    Args:
        scores: [P, 2] scores of the responses.
        paraphrased: [P, 2] scores of their paraphrases, NaN where a pair has none.

    Returns:
        `agreement` with its Wilson interval of 95 %, and `score_shift`, the mean absolute difference of
        a response's score and its paraphrase's. Equal scores on one side only are half an agreement.
        None without paraphrases.
    """
    there = ~np.isnan(paraphrased).any(1)
    if not there.any():
        return None
    before, after = (np.sign(s[there, 0] - s[there, 1]) for s in (scores, paraphrased))
    same = 1 - np.abs(before - after) / 2
    low, high = wilson_interval(float(same.sum()), same.size)
    return {
        "num_pairs": int(same.size),
        "agreement": float(same.mean()),
        "agreement_low": low,
        "agreement_high": high,
        "score_shift": float(np.abs(scores[there] - paraphrased[there]).mean()),
    }


def ensemble_report(members: Sequence[Scored]) -> dict[str, Any]:
    """Return the report on M members' scores of the same pairs; see the module.

    Raises:
        RecordError: no member, or members of other pairs.
    """
    if len({m.scores.shape for m in members}) != 1 or any(
        not np.array_equal(m.lengths, members[0].lengths) for m in members
    ):
        shapes = ", ".join(str(list(m.scores.shape)) for m in members) or "none"
        raise RecordError(f"an ensemble's report needs scores of the same pairs, found {shapes}")
    scores = np.stack([m.scores for m in members])  # [M, P, 2]
    paraphrased = [m.paraphrased for m in members if m.paraphrased is not None]
    together = Scored(
        scores=scores.mean(0),
        lengths=members[0].lengths,
        paraphrased=np.mean(paraphrased, 0) if len(paraphrased) == len(members) else None,
    )
    verdicts = np.sign(scores[..., 0] - scores[..., 1])  # [M, P]
    split = (verdicts != verdicts[0]).any(0)
    margins = together.scores[:, 0] - together.scores[:, 1]
    right = (1 + np.sign(margins)) / 2
    return {
        "members": [m.report() for m in members],
        "ensemble": together.report(),
        "disagreement": {
            "score_std": float(scores.std(0).mean()),
            "split_fraction": float(split.mean()),
            "accuracy_split": float(right[split].mean()) if split.any() else None,
            "accuracy_unanimous": float(right[~split].mean()) if not split.all() else None,
        },
        "spread": [float(own.std()) for own in scores],
    }
