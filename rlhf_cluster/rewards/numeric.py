r"""1.0 when the final number of the completion is that of the expected answer, 0.0 otherwise.

The final number of a text is the first one after the last `####`; else the last one in the last
`\boxed{}`; else the last one of the whole text. The same rule reads both sides, so GSM8K's answers
serve as they are.

Numbers: sign, thousands commas, decimals, powers of ten (1.5e3), fractions (3/4, \frac{3}{4}),
mixed numbers (2 1/2). Currency signs, percent signs and units are dropped, not converted: 50%
reads as 50. Arithmetic is exact (`Fraction`), never floating point. Reading takes time linear in
the text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

from pydantic import Field

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.base import RewardContext, RewardSection
from rlhf_cluster.rewards.columns import column
from rlhf_cluster.rewards.failure import RewardFailure

MAX_NUMBER_CHARACTERS = 100
"""Longer runs of digits are no number: reading one takes time quadratic in its length."""

_NUMBER = re.compile(
    r"""
    (?<![A-Za-z0-9_])(?<![0-9]\.)          # not inside a word or another number
    (?:(?<![)\]}])(?P<sign>[-+]))?         # (10)-3 is a difference
    (?:[$\u20ac\u00a3][ ]?(?P<inner>-)?)?  # -$5 and $-5
    (?:(?P<mixed>\d{1,15})[ ](?=\d{1,15}/\d))?
    (?P<number>
        (?:\d{1,3}(?:,\d{3})+(?!\d) | \d+ | (?<!\.)(?=\.\d))
        (?:\.\d+)?
        (?:[eE][-+]?\d{1,3}(?![A-Za-z0-9]))?
    )
    (?:[ ]?/[ ]?(?P<denominator>\d+(?:\.\d+)?))?
    """,
    re.VERBOSE | re.ASCII,
)
_LATEX_FRACTION = re.compile(
    r"(?P<whole>\d)?\\[dtc]?frac\{(?P<top>-?[\d.,]{1,32})\}\{(?P<bottom>[\d.,]{1,32})\}", re.ASCII
)
_SPELLINGS = (("\u2212", "-"), ("{,}", ","), ("\\$", "$"), ("\\,", ""), ("\\!", ""))


class NumericConfig(RewardSection):
    """The final number of the completion equals that of a column."""

    type: Literal["numeric"] = "numeric"
    target_column: str = "answer"
    """Column with the expected answer: a number, or text that ends in one."""
    tolerance: float = Field(default=0.0, ge=0)
    """Largest absolute difference that still counts as equal."""


class Numeric:
    def __init__(self, config: NumericConfig, context: RewardContext) -> None:
        self._config = config
        self._tolerance = Fraction(str(config.tolerance))

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 a rollout; no number scores 0.0. `RewardFailure` without a usable target."""
        expected = self._expected(prompt)
        found = [final_number(text) for text in completions]
        return [
            1.0 if number is not None and abs(number - expected) <= self._tolerance else 0.0
            for number in found
        ]

    def close(self) -> None:
        """Nothing to release."""

    def _expected(self, prompt: Prompt) -> Fraction:
        target = column(prompt, self._config.target_column)
        number = _target_number(target)
        if number is None:
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: no number in "
                f"{type(target).__name__} {str(target)[-60:]!r}. Correct the row, or set "
                "target_column to the column with the answer",
                "column",
            )
        return number


def final_number(text: str) -> Fraction | None:
    """The final number of `text` by the rule above, None when there is none."""
    for spelling, plain in _SPELLINGS:
        text = text.replace(spelling, plain)
    _, marker, after = text.rpartition("####")
    if marker:
        first = _NUMBER.search(_plain_fractions(after))
        return _value(first) if first else None
    _, marker, after = text.rpartition("\\boxed{")
    last = None
    for match in _NUMBER.finditer(_plain_fractions(_up_to_brace(after) if marker else text)):
        last = match
    return _value(last) if last else None


def _target_number(target: Any) -> Fraction | None:
    if isinstance(target, str):
        return final_number(target)
    if isinstance(target, bool) or not isinstance(target, int | float):
        return None
    return Fraction(repr(target)) if math.isfinite(target) else None


def _plain_fractions(text: str) -> str:
    def plain(match: re.Match[str]) -> str:
        whole = f"{match['whole']} " if match["whole"] else ""
        return f"{whole}{match['top']}/{match['bottom']}"

    return _LATEX_FRACTION.sub(plain, text)


def _up_to_brace(text: str) -> str:
    """`text` up to the brace that closes one opened before it; all of it when none does."""
    depth = 1
    for match in re.finditer(r"[{}]", text):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[: match.start()]
    return text


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > MAX_NUMBER_CHARACTERS:
        return None
    denominator = Fraction(match["denominator"] or 1)
    if denominator == 0:
        return None
    value = Fraction(match["number"].replace(",", "")) / denominator + int(match["mixed"] or 0)
    return -value if match["sign"] == "-" or match["inner"] else value
