"""What several scorers are worth on the same held-out pairs, alone and together: pure, numpy, no torch.

    members       the report of each (`objectives.report`)
    ensemble      the report on the mean of their scores
    disagreement  score_std: standard deviation of the members' scores of one response, a mean over all
                  responses; split_fraction: share of pairs on which not all members choose alike; and
                  the ensemble's accuracy on those, and on the others

A member's scale is its own: members whose scores spread differently weigh differently in the mean, so
`spread` gives each one's standard deviation over all responses.

Promises: every pair counts; pairs in any order give the same report; members that scored other pairs
are refused.

Shapes: P pairs, M members.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf_cluster.errors import RecordError
from rlhf_cluster.objectives.report import validation_report, wilson_interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One scorer's scores of held-out pairs."""

    scores: np.ndarray  # [P, 2] float64, the chosen response's and the rejected one's
    lengths: np.ndarray  # [P, 2] tokens of the responses
    paraphrased: np.ndarray | None = (
        None  # [P, 2] the same of paraphrases, NaN where there are none
    )

    def report(self) -> dict[str, Any]:
        """Of this scorer alone."""
        report = validation_report(*self.scores.T, *self.lengths.T).as_dict()
        if self.paraphrased is not None:
            report["paraphrases"] = paraphrase_report(self.scores, self.paraphrased)
        return report

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
        """From `as_dict`'s."""
        rows = values["paraphrased"]
        if rows is not None:
            rows = np.array([row or (np.nan, np.nan) for row in rows], dtype=np.float64)
        return cls(
            scores=np.array(values["scores"], dtype=np.float64),
            lengths=np.array(values["lengths"]),
            paraphrased=rows,
        )


def paraphrase_report(scores: np.ndarray, paraphrased: np.ndarray) -> dict[str, Any] | None:
    """How often the verdict on a pair stays when its responses are said in other words.

    Args:
        scores: [P, 2] of the responses.
        paraphrased: [P, 2] of their paraphrases, NaN where a pair has none.

    Returns:
        `agreement` with its Wilson interval of 95 % (equal scores on one side only are half an
        agreement), and `score_shift`, the mean absolute difference of a response's score and its
        paraphrase's. None without paraphrases.
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
    """The report on M members' scores of the same pairs; see the module.

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
