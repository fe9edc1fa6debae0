r"""1.0 when the final number of the completion is that of the expected answer, 0.0 otherwise.

`final_answer.py` says where a completion states its answer, and `quantities.py` what number that is: in
a box the only one; in words the first one, or what their equation comes to. A text without a marked
answer counts by its last number. Several numbers ("72 or 73"), arithmetic that is left undone
(`40 + 32`) and times (`3:30`) are not read as a number.

Currency signs, percent signs and units are dropped, not converted: 50% reads as 50. Arithmetic is
exact (`Fraction`), never floating point. Reading takes time linear in the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, column
from rlhf_cluster.rewards.rules.final_answer import final_statement
from rlhf_cluster.rewards.rules.quantities import read_statement, read_target
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection


class NumericConfig(ReasoningSection):
    """The final number of the completion equals that of a column."""

    type: Literal["numeric"] = "numeric"
    target_column: str = "answer"
    """Column with the expected answer: a number, or text with one, or with one that is marked."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest absolute difference of two numbers that are equal."""


class Numeric:
    def __init__(self, config: NumericConfig, context: RewardContext) -> None:
        self._config = config
        self._tolerance = Fraction(str(config.tolerance))

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 per rollout; no number scores 0.0. `RewardFailure` without a usable target."""
        expected = self._read_target(prompt)
        found = [final_number(text) for text in self._config.without_reasoning(completions)]
        return [
            1.0 if number is not None and abs(number - expected) <= self._tolerance else 0.0
            for number in found
        ]

    def close(self) -> None:
        """Nothing to release."""

    def _read_target(self, prompt: Prompt) -> Fraction:
        target = column(prompt, self._config.target_column)
        number = _target_number(target)
        if number is None:
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: no number, or more "
                f"than one, in {type(target).__name__} {str(target)[-60:]!r}. Put the answer "
                "after #### on a line of its own, or in \\boxed{}, or set target_column to the "
                "column with the answer",
                "column",
            )
        return number


def final_number(text: str) -> Fraction | None:
    """The final number of a completion by the rule above, None when there is none."""
    found = read_statement(final_statement(text))
    return found.value if found else None


def _target_number(target: Any) -> Fraction | None:
    if isinstance(target, str):
        found = read_target(target)
        return found.value if found else None
    if isinstance(target, bool) or not isinstance(target, int | float):
        return None
    return Fraction(repr(target)) if math.isfinite(target) else None
