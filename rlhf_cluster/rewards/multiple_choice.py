r"""1.0 when the completion chooses the expected letter, 0.0 otherwise.

The choice of a text is the first of these that it has; nothing else counts as a choice:

1. after its last `####`, else in its last `\boxed{}`: a letter and nothing else on that line;
2. the last "answer is X" or "answer: X" (also "answer is option X") with a capital letter;
3. its last line that is a letter and nothing else.

A letter may stand in parentheses, brackets, asterisks, `\text{}`, and before a full stop, colon or
closing parenthesis; it is one of `choices`, of either case but for rule 2. Two letters are no choice.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.base import RewardContext, RewardSection
from rlhf_cluster.rewards.columns import column
from rlhf_cluster.rewards.failure import RewardFailure

_OPEN = r"[(\[{*_\s$]{0,8}"
_CLOSE = r"[)\]}*_\s$.:,]{0,8}"
_LETTER = re.compile(rf"{_OPEN}(?:\\(?:text|textbf|mathrm|mathbf)\s?\{{)?{_OPEN}([A-Za-z]){_CLOSE}")
_SAID = re.compile(
    rf"\b(?i:answer)\s{{0,4}}(?i:is|:|=)[:\s]{{0,4}}(?i:option|choice)?{_OPEN}([A-Z])(?![\w'])"
)


class MultipleChoiceConfig(RewardSection):
    """The completion chooses the letter of a column."""

    type: Literal["multiple_choice"] = "multiple_choice"
    target_column: str = "answer"
    """Column with the right choice: its letter, or its number counted from 0."""
    choices: str = Field(default="ABCD", pattern=r"^[A-Z]{2,26}$")
    """The letters, in the order of their numbers."""


class MultipleChoice:
    def __init__(self, config: MultipleChoiceConfig, context: RewardContext) -> None:
        self._config = config

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 a rollout. Raises `RewardFailure` without a usable target."""
        expected = self._expected(prompt)
        choices = self._config.choices
        return [1.0 if choice(text, choices) == expected else 0.0 for text in completions]

    def close(self) -> None:
        """Nothing to release."""

    def _expected(self, prompt: Prompt) -> str:
        target: Any = column(prompt, self._config.target_column)
        letters = self._config.choices
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(letters):
            return letters[target]
        match = _LETTER.fullmatch(target) if isinstance(target, str) else None
        if match is None or match[1].upper() not in letters:
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: found "
                f"{target!r:.60}, expected one of {letters} or a number from 0 to "
                f"{len(letters) - 1}. Correct the row, or set choices",
                "column",
            )
        return match[1].upper()


def choice(text: str, choices: str) -> str | None:
    """The letter that `text` chooses by the rules above, None when it chooses none."""
    _, marker, after = text.rpartition("####")
    if not marker:
        _, marker, after = text.rpartition("\\boxed{")
    if marker:
        lines = after.strip().splitlines()
        return _letter(lines[0], choices) if lines else None
    said = [found for found in _SAID.findall(text) if found in choices]
    if said:
        return said[-1]
    for line in reversed(text.splitlines()):
        found = _letter(line, choices)
        if found is not None:
            return found
    return None


def _letter(line: str, choices: str) -> str | None:
    match = _LETTER.fullmatch(line) if len(line) < 64 else None
    return match[1].upper() if match and match[1].upper() in choices else None
