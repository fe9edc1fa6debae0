"""Normalisation of reward parts by running statistics over all trained rollouts.

    p'_ik = (p_ik - mean_k) / (std_k + 1e-4)      where part k has normalize = "running"
    reward_i = sum over k of w_k p'_ik            p' = p for the other parts

mean_k and std_k are over the parts of all rollouts that were trained up to and including this step,
each once.

Promises:
- every rank computes the same values, as the groups of the step have the same order on all ranks,
  whichever finished first;
- the state is three numbers per part, which are saved with the learner. A resumed run has the numbers
  of an uninterrupted one;
- nothing else of a rollout changes: its parts stay the same, like the reward in its sample.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.errors import RecordError
from rlhf_cluster.learner.rank_checkpoint import Stateful
from rlhf_cluster.records import ExperienceGroup

EPSILON = 1e-4
_FIELDS = ("count", "mean", "squares")


@dataclass(frozen=True, slots=True)
class Moments:
    """Count of the numbers seen, their mean, and the sum of squared differences from it."""

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def std(self) -> float:
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def with_more(self, values: np.ndarray) -> Moments:
        """Return the moments of the numbers seen and `values` together (Chan et al. 1979)."""
        if len(values) == 0:
            return self
        mean, count = float(values.mean()), self.count + len(values)
        delta = mean - self.mean
        return Moments(
            count,
            self.mean + delta * len(values) / count,
            self.squares
            + float(((values - mean) ** 2).sum())
            + delta * delta * self.count * len(values) / count,
        )


class RunningNormalizer:
    """Running normaliser of reward parts.

    `weights`: weights of all parts by name. `names`: the parts that are normalised.
    """

    def __init__(self, weights: Mapping[str, float], names: Sequence[str]) -> None:
        self._weights = dict(weights)
        self._moments = {name: Moments() for name in names}

    @classmethod
    def of(cls, scoring: Scoring) -> RunningNormalizer:
        rewards = {r.name or r.type: r for r in scoring.rewards if not r.watch}
        weights = {name: reward.weight for name, reward in rewards.items()}
        return cls(weights, [n for n, reward in rewards.items() if reward.normalize == "running"])

    def apply(self, groups: Sequence[ExperienceGroup]) -> Sequence[ExperienceGroup]:
        """Return the groups of one step with rewards of normalised parts, and update the statistics.

        Call it once per step, in order.

        Raises: `RecordError` for a rollout whose parts are not exactly those with weights.
        """
        if not self._moments:
            return groups
        parts = [scored.reward_parts for group in groups for scored in group.scored]
        for own in parts:
            if own.keys() != self._weights.keys():
                raise RecordError(
                    f"a rollout has the parts {sorted(own)}, scoring.rewards has "
                    f"{sorted(self._weights)}; every rollout needs exactly these"
                )
        new = [scored.reward_parts for group in groups if not group.uses for scored in group.scored]
        for name, moments in self._moments.items():
            values = np.array([own[name] for own in new], dtype=np.float64)
            self._moments[name] = moments.with_more(values)
        return [
            replace(
                group,
                scored=tuple(
                    replace(scored, reward=self._reward(scored.reward_parts))
                    for scored in group.scored
                ),
            )
            for group in groups
        ]

    def metrics(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, moments in self._moments.items():
            found[f"reward/running_mean/{name}"] = moments.mean
            found[f"reward/running_std/{name}"] = moments.std
        return found

    def state(self) -> dict[str, float]:
        return {
            f"normalize/{name}/{field}": getattr(moments, field)
            for name, moments in self._moments.items()
            for field in _FIELDS
        }

    def load_state(self, state: Mapping[str, float]) -> None:
        """Restore the statistics of `state()`."""
        self._moments = {
            name: Moments(*(state[f"normalize/{name}/{field}"] for field in _FIELDS))
            for name in self._moments
        }

    def _reward(self, parts: Mapping[str, float]) -> float:
        return math.fsum(self._weights[n] * self._normalize(n, p) for n, p in parts.items())

    def _normalize(self, name: str, part: float) -> float:
        moments = self._moments.get(name)
        return part if moments is None else (part - moments.mean) / (moments.std + EPSILON)


class Joined:
    """Several stateful objects as one. The names of their numbers must differ."""

    def __init__(self, *parts: Stateful) -> None:
        self._parts = parts

    def state(self) -> dict[str, float]:
        return {name: value for part in self._parts for name, value in part.state().items()}

    def load_state(self, state: dict[str, float]) -> None:
        for part in self._parts:
            part.load_state(state)
