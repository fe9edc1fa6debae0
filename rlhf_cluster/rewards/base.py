"""What a reward is to the scoring pool.

A reward scores all rollouts of one group at once and returns one finite float each, in order. It
raises `ScoringError` (with the reason) when it cannot: an error is an outcome of its own, retried
and then counted as a discard, and never turns into a score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pydantic import Field

from rlhf_cluster.config.base import Section
from rlhf_cluster.records import Prompt, Rollout


class RewardSection(Section):
    """Keys that every reward has."""

    name: str | None = None
    """Name of this part of the reward in metrics and samples; default: its type."""
    weight: float = 1.0
    """Factor of this part in the sum."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of one group."""


class Reward(Protocol):
    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """One score a rollout. `completions` are the decoded responses without special tokens."""
        ...

    def close(self) -> None: ...
