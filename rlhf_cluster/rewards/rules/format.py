r"""1.0 when the whole completion matches a regular expression, 0.0 otherwise.

The pattern is one of the library `regex` (Python's syntax), matched from the first to the last
character with DOTALL; white space around the completion does not count. Matching has a deadline: a
pattern that takes longer on some text is at fault, and the group fails (`RewardFailure`).

    pattern = '<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>'

`.*?` instead would reach over a closing tag wherever that makes the whole match, and so accept two
answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import regex
from pydantic import Field, field_validator

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext, RewardSection
from rlhf_cluster.rewards.reward_failure import RewardFailure


class FormatConfig(RewardSection):
    """The completion matches a pattern."""

    type: Literal["format"] = "format"
    pattern: str = Field(min_length=1)
    """Regular expression of the whole completion."""
    match_s: float = Field(default=2.0, gt=0)
    """Deadline of matching one completion."""

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            regex.compile(pattern, regex.DOTALL)
        except regex.error as error:
            raise ValueError(f"is not a regular expression ({error}). Correct it") from error
        return pattern


class Format:
    def __init__(self, config: FormatConfig, context: RewardContext) -> None:
        self._config = config
        self._pattern = regex.compile(config.pattern, regex.DOTALL)

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 per rollout. Raises `RewardFailure` where matching took too long."""
        return [1.0 if self._matches(text.strip()) else 0.0 for text in completions]

    def close(self) -> None:
        """Nothing to release."""

    def _matches(self, text: str) -> bool:
        try:
            # `concurrent`: other threads run meanwhile.
            found = self._pattern.fullmatch(text, timeout=self._config.match_s, concurrent=True)
        except TimeoutError as error:
            raise RewardFailure(
                f"pattern {self._config.pattern!r:.80} was not done with {len(text)} characters "
                f"after {self._config.match_s:g} s. Write it without nested repetition, or raise "
                "match_s",
                "timeout",
            ) from error
        return found is not None
