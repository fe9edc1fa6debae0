"""1.0 when the completion is the expected text, 0.0 otherwise.

Both sides are compared without surrounding white space. With `require_stop` a rollout that was cut
at the length limit never matches: the model has not ended its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from rlhf_cluster.records import FinishReason, Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext, RewardSection
from rlhf_cluster.rewards.reward_failure import RewardFailure, column


class ExactMatchConfig(RewardSection):
    """Completion equals a column."""

    type: Literal["exact_match"] = "exact_match"
    target_column: str = "answer"
    """Column with the expected text."""
    require_stop: bool = True
    """A rollout cut at the length limit does not match, whatever its text."""


class ExactMatch:
    def __init__(self, config: ExactMatchConfig, context: RewardContext) -> None:
        self._config = config

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 per rollout. Raises `RewardFailure` without a usable target."""
        target = column(prompt, self._config.target_column)
        if isinstance(target, bool) or not isinstance(target, str | int):
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: found "
                f"{type(target).__name__}, expected text. Correct the row",
                "column",
            )
        expected = str(target).strip()
        return [
            1.0 if text.strip() == expected and self._has_ended(rollout) else 0.0
            for rollout, text in zip(rollouts, completions, strict=True)
        ]

    def close(self) -> None:
        """Nothing to release."""

    def _has_ended(self, rollout: Rollout) -> bool:
        return not self._config.require_stop or rollout.finish_reason is FinishReason.STOP
