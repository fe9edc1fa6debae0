"""Protocols of rewards, as the scoring pool calls them.

A reward scores all rollouts of one group at once and returns one finite float each, in order. It
raises `ScoringError` (with the reason) when it cannot: an error is retried, then counted as a
discard, and never turns into a score.

A reward of reasoning steps scores each step of a response instead (`data.reasoning_steps` cuts
them); its part of the rollout's reward is the sum of its steps' scores.

A reward may return more per rollout than its score (`Detailed`), and have a version that its section
does not show (`Versioned`).

A reward is built from its section and a `RewardContext`, and is ready to score once built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from pydantic import Field, model_validator

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.sections.section import Section


class RewardSection(Section):
    """Keys that every reward has."""

    name: str | None = Field(default=None, pattern=r"^[^/]+$")
    """Name of this part of the reward in metrics and samples, without "/"; default: its type."""
    weight: float = 1.0
    """Factor of this part in the sum."""
    clip: tuple[float, float] | None = None
    """[low, high]: scores outside are taken as the nearer end; they are kept as `<name>.unclipped`."""
    normalize: Literal["none", "running"] = "none"
    """`running`: the learner takes off the mean of all scores trained so far and divides by their
    standard deviation, then weighs; see `learner.reward_normalizer`."""
    watch: bool = False
    """Computed, stored and shown, and never part of the reward that is optimised."""
    timeout_s: float = Field(default=30.0, gt=0)
    """Deadline of one group."""

    @property
    def scores_steps(self) -> bool:
        """The reward is a `StepReward`."""
        return False

    @property
    def scores_alone(self) -> bool:
        """A score depends on prompt and response alone, and is the same every time: it may be kept."""
        return False

    @property
    def details(self) -> tuple[str, ...]:
        """Names of the numbers that a `Detailed` reward returns in addition to the score; else none."""
        return ()

    @property
    def model_paths(self) -> tuple[str, ...]:
        """Folders of models that are loaded with the scoring worker, not before."""
        return ()

    @model_validator(mode="after")
    def _check_shaping(self) -> RewardSection:
        shaped = [
            text
            for text, is_set in (
                (f"clip = {self.clip and list(self.clip)}", self.clip is not None),
                (f"normalize = {self.normalize!r}", self.normalize != "none"),
            )
            if is_set
        ]
        if not shaped:
            return self
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(
                f"clip = {list(self.clip)}: the first is not below the second. Swap them"
            )
        if self.watch:
            raise ValueError(
                f"{shaped[0]} with watch = true: what is watched is shown as it is. Remove one"
            )
        if self.scores_steps:
            raise ValueError(
                f"{shaped[0]} with a reward of steps: what it changes has no place among the steps. "
                "Let the reward itself bound its steps' scores"
            )
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardContext:
    """Settings of the scoring worker that a reward may need."""

    tokenizer_dir: str | None = None  # the policy's tokenizer
    device: str = "cpu"
    wait_timeout_s: float = 300.0  # for a child process or model that other groups hold
    step_separator: str = "\n"  # of the reasoning steps of a response
    batch_groups: int = 1  # that may share the passes of a model


class Reward(Protocol):
    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """Return one score per rollout. `completions` are the decoded responses without special tokens.

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
        """Return one score per step of each rollout; `steps` are the segments of each of `completions`.

        Safe to call from several threads at once.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Detailed(Protocol):
    """Reward that returns more per rollout than its score."""

    def score_in_detail(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """Return the scores, and for each of the section's `details` one number per rollout."""
        ...


@runtime_checkable
class Versioned(Protocol):
    """A reward whose scores are decided by more than its section, such as a model's weights."""

    @property
    def version(self) -> str:
        """Digest of what decides the scores; independent of where the files are."""
        ...


@runtime_checkable
class CountsOutcomes(Protocol):
    """A reward that also counts what it saw: `outcomes/<reward>/<outcome>` of a scorer's totals."""

    def outcomes(self) -> dict[str, float]:
        """Totals so far, by a short name. Safe to call while `score` runs."""
        ...
