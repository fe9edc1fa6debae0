"""Why a reward gave no score. Every reason is counted apart; none of them ever becomes a score."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_cluster.errors import ScoringError

Reason = Literal[
    "start",  # the reward cannot be loaded
    "busy",  # no free child process or model within the deadline
    "timeout",
    "raised",
    "died",
    "reply",  # not the answer of a child process of ours
    "column",  # a data column is missing or unusable
    "tokens",  # a sequence that the reward model cannot take
    "not_a_list",
    "length",
    "none",
    "not_a_number",
    "nan",
    "infinite",
    "other",
]


class RewardFailure(ScoringError):
    """A reward without scores. `reason` is short and of a fixed set, for counters."""

    reason: Reason

    def __init__(self, message: str, reason: Reason = "other") -> None:
        super().__init__(message)
        self.reason = reason


def check_scores(scores: Any, num_rollouts: int) -> list[float]:
    """`scores` as finite floats, one a rollout. Raises `RewardFailure` with the reason."""
    if not isinstance(scores, Sequence) or isinstance(scores, str | bytes):
        found = f"{type(scores).__name__} {_short(scores)}"
        raise RewardFailure(
            f"returned {found}, expected a list of {num_rollouts} floats", "not_a_list"
        )
    if len(scores) != num_rollouts:
        raise RewardFailure(
            f"returned {len(scores)} scores for {num_rollouts} rollouts; return exactly one each",
            "length",
        )
    return [_check_score(score, index) for index, score in enumerate(scores)]


def _check_score(score: Any, index: int) -> float:
    if score is None:
        raise RewardFailure(
            f"returned None for rollout {index}; return a float for every rollout", "none"
        )
    if not isinstance(score, int | float):
        found = f"{type(score).__name__} {_short(score)}"
        raise RewardFailure(f"returned {found} for rollout {index}; return a float", "not_a_number")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if math.isnan(value):
        raise RewardFailure(f"returned NaN for rollout {index}; return a finite float", "nan")
    if math.isinf(value):
        raise RewardFailure(
            f"returned an infinite score for rollout {index}; return a finite float", "infinite"
        )
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
