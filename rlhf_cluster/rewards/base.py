"""What a reward is to the scoring pool.

A reward scores all rollouts of one group at once and returns one finite float each, in order. It
raises `ScoringError` (with the reason) when it cannot: an error is an outcome of its own, retried
and then counted as a discard, and never turns into a score.

A reward of reasoning steps scores each step of a response instead (`scoring.steps` cuts them); its
part of the rollout's reward is the sum of its steps' scores.

A reward is built from its section and a `RewardContext`, and is ready to score once built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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

    @property
    def scores_steps(self) -> bool:
        """The reward is a `StepReward`."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardContext:
    """What a reward may need of the worker that holds it."""

    tokenizer_dir: str | None = None  # the policy's tokenizer
    device: str = "cpu"
    wait_timeout_s: float = 300.0  # for a child process or model that other groups hold


class Reward(Protocol):
    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """One score a rollout. `completions` are the decoded responses without special tokens.

        Safe to call from several threads at once.
        """
        ...

    def close(self) -> None: ...


class StepReward(Protocol):
    """A reward of reasoning steps; `score` need not be there."""

    def score_steps(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """One score a step of each rollout; `steps` are the segments of each of `completions`.

        Safe to call from several threads at once.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class CountsOutcomes(Protocol):
    """A reward that also counts what it saw: `outcomes/<reward>/<outcome>` of a scorer's totals."""

    def outcomes(self) -> dict[str, float]:
        """Totals so far, by a short name. Safe to call while `score` runs."""
        ...
