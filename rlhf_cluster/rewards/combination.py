"""Objectives: rules that combine the parts of a reward. One class and one entry in `Objective` each.

With p_k the score of part k (clipped where its reward has `clip`) and w_k its weight, each part
counts c_k, and the reward is the sum of the c_k:

    weighted_sum     c_k = w_k p_k
    constrained      c_k = w_k p_k - coef * max(0, floor_k - p_k)    where part k has a floor
    lexicographic    c_k = w_k p_k, or 0 where an earlier part of `order` is below its threshold

`constrained` is the penalty method with a fixed multiplier: above its floors a part is worth what
its weight says (nothing, with weight 0), below them each missing unit costs `coef` more. A multiplier
that adapts would be a dual ascent (Moskovitz et al. 2023, arXiv:2310.04373; Dai et al. 2023,
arXiv:2310.12773).

`lexicographic` opens a part when all before it are good enough. A later part that can be negative
would make it cost something to be good enough: let it start at 0, or clip it.

Parts that are watched are never among them. Shapes: none, these are numbers of one rollout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, model_validator

from rlhf_cluster.sections.section import Section

Parts = Mapping[str, float]


class ObjectiveSection(Section):
    """Base of every objective."""

    @property
    def names(self) -> tuple[str, ...]:
        """The rewards that the objective names."""
        return ()

    def count_parts(self, parts: Parts, weights: Parts) -> dict[str, float]:
        """Return what each part adds to the reward, by name: c_k above."""
        return {name: weights[name] * part for name, part in parts.items()}


class WeightedSum(ObjectiveSection):
    """Every part by its weight."""

    type: Literal["weighted_sum"] = "weighted_sum"


class Constrained(ObjectiveSection):
    """The weighted sum, less a penalty for each part below its floor."""

    type: Literal["constrained"] = "constrained"
    floors: dict[str, float] = Field(min_length=1)
    """Floor of a reward by its name, in the unit of its score."""
    coef: PositiveFloat = 1.0
    """Penalty of one unit below a floor."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.floors)

    def count_parts(self, parts: Parts, weights: Parts) -> dict[str, float]:
        found = super().count_parts(parts, weights)
        for name, floor in self.floors.items():
            found[name] -= self.coef * max(0.0, floor - parts[name])
        return found


class Lexicographic(ObjectiveSection):
    """Parts in an order: a later one counts where all before it reach their thresholds."""

    type: Literal["lexicographic"] = "lexicographic"
    order: list[str] = Field(min_length=2)
    """Names of rewards, the first the most important; rewards that are not named always count."""
    thresholds: dict[str, float]
    """Score that opens what comes later, for each of `order` but the last."""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.order)

    def count_parts(self, parts: Parts, weights: Parts) -> dict[str, float]:
        found = super().count_parts(parts, weights)
        is_open = True
        for name in self.order:
            if not is_open:
                found[name] = 0.0
            is_open = is_open and parts[name] >= self.thresholds.get(name, -float("inf"))
        return found

    @model_validator(mode="after")
    def _check(self) -> Lexicographic:
        if len(set(self.order)) < len(self.order):
            raise ValueError(f"order = {self.order} names a reward twice. Name each once")
        expected = self.order[:-1]
        if set(self.thresholds) != set(expected):
            raise ValueError(
                f"thresholds has {sorted(self.thresholds)}, expected exactly {sorted(expected)}: each "
                "of order but the last. Give these"
            )
        return self


Objective = Annotated[WeightedSum | Constrained | Lexicographic, Field(discriminator="type")]
