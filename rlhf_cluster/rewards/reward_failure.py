"""Failures of a reward, the checks of its scores, and data columns as rewards read them.

Each reason of a failure is counted separately. No failure, and no column that cannot be used, ever
becomes a score.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from rlhf_cluster.errors import ScoringError
from rlhf_cluster.records import Prompt

Reason = Literal[
    "start",  # the reward cannot be loaded
    "busy",  # no free child process or model within the deadline
    "timeout",
    "raised",
    "died",
    "sandbox",  # the sandbox of a program cannot be built, or was lost
    "remote",  # a server that cannot be reached, or refuses
    "ids",  # answers that cannot be joined to what was asked
    "reply",  # not the answer of a child process of ours
    "column",  # a data column is missing or unusable
    "tokens",  # a sequence that the reward model cannot take
    "not_a_list",
    "length",
    "steps",  # another number of step scores than the response has steps
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
    """Return `scores` as finite floats, one per rollout. Raises `RewardFailure` with the reason."""
    if not _is_list(scores):
        found = f"{type(scores).__name__} {_short(scores)}"
        raise RewardFailure(
            f"returned {found}, expected a list of {num_rollouts} floats", "not_a_list"
        )
    if len(scores) != num_rollouts:
        raise RewardFailure(
            f"returned {len(scores)} scores for {num_rollouts} rollouts; return exactly one each",
            "length",
        )
    return [_check_score(score, f"rollout {index}") for index, score in enumerate(scores)]


def check_step_scores(scores: Any, num_steps: Sequence[int]) -> list[list[float]]:
    """Return `scores` as finite floats, one per step of each rollout; `num_steps` has each rollout's.

    Raises `RewardFailure` with the reason; the message names the rollout and both numbers of steps.
    """
    if not _is_list(scores):
        found = f"{type(scores).__name__} {_short(scores)}"
        raise RewardFailure(
            f"returned {found}, expected {len(num_steps)} lists of step scores", "not_a_list"
        )
    if len(scores) != len(num_steps):
        raise RewardFailure(
            f"returned {len(scores)} lists of step scores for {len(num_steps)} rollouts; return "
            "exactly one each",
            "length",
        )
    return [
        _check_steps(own, index, expected)
        for index, (own, expected) in enumerate(zip(scores, num_steps, strict=True))
    ]


def _check_steps(scores: Any, index: int, expected: int) -> list[float]:
    where = f"rollout {index}, which has {expected} steps"
    if scores is None:
        raise RewardFailure(f"returned None for {where}; return a list of floats", "none")
    if not _is_list(scores):
        found = f"{type(scores).__name__} {_short(scores)}"
        raise RewardFailure(f"returned {found} for {where}; return a list of floats", "not_a_list")
    if len(scores) != expected:
        raise RewardFailure(
            f"returned {len(scores)} step scores for {where}; return one for each of `steps`",
            "steps",
        )
    return [_check_score(s, f"step {number} of {where}") for number, s in enumerate(scores)]


def _check_score(score: Any, where: str) -> float:
    if score is None:
        raise RewardFailure(f"returned None for {where}; return a float for each", "none")
    if not isinstance(score, int | float):
        found = f"{type(score).__name__} {_short(score)}"
        raise RewardFailure(f"returned {found} for {where}; return a float", "not_a_number")
    try:
        value = float(score)
    except OverflowError:
        value = math.inf
    if math.isnan(value):
        raise RewardFailure(f"returned NaN for {where}; return a finite float", "nan")
    if math.isinf(value):
        raise RewardFailure(
            f"returned an infinite score for {where}; return a finite float", "infinite"
        )
    return value


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def column(prompt: Prompt, name: str) -> Any:
    """The value of column `name` of the prompt's row. Raises `RewardFailure` when it is absent."""
    if name not in prompt.columns:
        known = ", ".join(sorted(prompt.columns)) or "none"
        raise RewardFailure(
            f"prompt {prompt.prompt_id} has no column {name!r}; its columns: {known}. Set "
            "target_column to one of them",
            "column",
        )
    return prompt.columns[name]
