"""Several reward models as one reward that does not trust where they disagree.

With r_k the score of member k of K, mean and std over the members (std = sqrt(mean((r_k - mean)^2))):

    mean             r = mean
    min              r = min_k r_k
    mean_minus_std   r = mean - coef * std

A policy finds what one reward model overrates; members that were trained on other data, from other
seeds, seldom overrate the same. Coste et al. 2023 (arXiv:2310.02743) compare the mean, the minimum
and the mean less the variance; Eisenstein et al. 2023 (arXiv:2312.09244) the mean less the standard
deviation, which has the reward's unit. Both find that over-optimisation gets less and does not end:
where all members are wrong alike, none of these helps.

Only differences of one member's scores within a prompt mean anything: members whose scores
differ in offset or spread have no meaningful minimum and deviation. Train
them with the same data format, loss and centring.

Every sample has each member's score as `<name>.0`, `<name>.1` ..., the deviation as
`<name>.disagreement`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, model_validator
from xxhash import xxh3_128_hexdigest

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import ModelSection, RewardModel

Combine = Literal["mean", "min", "mean_minus_std"]
COEF = 1.0
Array = np.ndarray


class EnsembleConfig(ModelSection):
    """Several reward models, combined."""

    type: Literal["ensemble"] = "ensemble"
    paths: list[str] = Field(min_length=2)
    """Folders of the members, each as `path` of a reward model."""
    combine: Combine = "mean"
    """Rule that combines the members' scores."""
    coef: NonNegativeFloat = COEF
    """Number of standard deviations `mean_minus_std` takes off."""
    tokenizer: Literal["shared", "own"] = "shared"
    """Value of `reward_model` for all members."""

    @property
    def details(self) -> tuple[str, ...]:
        return (*(str(member) for member in range(len(self.paths))), "disagreement")

    @property
    def model_paths(self) -> tuple[str, ...]:
        return tuple(self.paths)

    @model_validator(mode="after")
    def _check(self) -> EnsembleConfig:
        twice = sorted({path for path in self.paths if self.paths.count(path) > 1})
        if twice:
            raise ValueError(
                f"paths names {twice[0]!r} {self.paths.count(twice[0])} times: a member always agrees "
                "with itself. Give each member once"
            )
        if self.coef != COEF and self.combine != "mean_minus_std":
            raise ValueError(
                f"coef = {self.coef:g} with combine = {self.combine!r}, which has none. Remove it, or "
                "set combine = 'mean_minus_std'"
            )
        return self


class Ensemble:
    def __init__(self, config: EnsembleConfig, context: RewardContext) -> None:
        """Loads all members. Raises `ConfigError` or `DataError` when one cannot serve."""
        self._config = config
        tokenizer = {"tokenizer": config.tokenizer}
        members = [config.of_model(path).model_copy(update=tokenizer) for path in config.paths]
        self._members = [RewardModel(member, context) for member in members]

    @property
    def version(self) -> str:
        return xxh3_128_hexdigest("".join(member.version for member in self._members).encode())

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        return self.score_in_detail(prompt, rollouts, completions)[0]

    def score_in_detail(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> tuple[list[float], dict[str, list[float]]]:
        """One member after the other. Raises `RewardFailure` where one of them fails."""
        found = [member.score(prompt, rollouts, completions) for member in self._members]
        scores = np.array(found, dtype=np.float64)
        details = {str(member): own for member, own in enumerate(found)}
        details["disagreement"] = disagreement(scores).tolist()
        return combine_scores(scores, self._config.combine, self._config.coef).tolist(), details

    def close(self) -> None:
        for member in self._members:
            member.close()


def combine_scores(scores: Array, combine: Combine, coef: float) -> Array:
    """[B] of the members' `scores` [K, B]; the formulas are in the module's docstring."""
    if combine == "min":
        return scores.min(axis=0)
    mean = scores.mean(axis=0)
    return mean - coef * disagreement(scores) if combine == "mean_minus_std" else mean


def disagreement(scores: Array) -> Array:
    """[B]: the standard deviation over the members (of the members themselves, not of a sample) of
    their `scores` [K, B]. Exactly 0 where they are equal."""
    centred = scores - scores[0]
    return centred.std(axis=0)
