"""The section [autoscale], off where it is not given, and what it must agree on with the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.config.pool_sections import (
    GENERATION,
    SCORING,
    pool_sections,
)
from rlhf_cluster.sections.section import Section

if TYPE_CHECKING:
    from rlhf_cluster.config.run_config import RunConfig


class PoolScale(Section):
    """Between which sizes a pool moves, and how often."""

    minimum: PositiveInt = 1
    maximum: PositiveInt
    cooldown_s: PositiveFloat = 300.0
    """From one change of the pool to the next. The other way it is four times as long."""


class Autoscale(Section):
    """Pools that follow the bottleneck advisor (`rlhf_cluster.run.autoscaler`). A pool without a
    section of its own keeps its size. Sizes at the start are `generation.workers` and the like."""

    generation: PoolScale | None = None
    scoring: PoolScale | None = None
    pools: dict[str, PoolScale] = Field(default_factory=dict)
    """Of those of `[scoring.pools]`, by name."""
    gpu_budget: float | None = Field(default=None, gt=0)
    """GPUs that the pools hold at most, together. One that can spare a GPU gives it to another."""
    grow_at: float = Field(default=1.1, gt=1)
    """A worker is added where it is foretold to make steps at least this many times as fast."""
    shrink_at: float = Field(default=1.03, ge=1)
    """A worker is taken away where steps are foretold to get at most this many times as slow."""
    steps: int = Field(default=8, ge=4, le=32)
    """Steps with the pools of now that are seen before a change."""

    @property
    def scales(self) -> dict[str, PoolScale]:
        """Of every pool that changes, by name."""
        found = {GENERATION: self.generation, SCORING: self.scoring, **self.pools}
        return {name: scale for name, scale in found.items() if scale is not None}


def check_autoscale(c: RunConfig) -> None:
    section = c.autoscale
    if section is None:
        return
    sections = pool_sections(c)
    unknown = sorted(section.scales.keys() - sections)
    if unknown:
        raise ValueError(
            f"[autoscale.pools.{unknown[0]}] without [scoring.pools.{unknown[0]}]: there is no such "
            f"pool. Pools: {', '.join(sections)}"
        )
    if not section.scales:
        raise ValueError(
            "[autoscale] without [autoscale.generation] or [autoscale.scoring]: no pool would change "
            "its size. Add one of them with a maximum, or remove the section"
        )
    if section.shrink_at >= section.grow_at:
        raise ValueError(
            f"autoscale.shrink_at = {section.shrink_at:g} is not under autoscale.grow_at = "
            f"{section.grow_at:g}: workers would come and go. Lower the former, or raise the latter"
        )
    sizes = {pool: own.workers for pool, own in sections.items()}
    for pool, scale in section.scales.items():
        if not scale.minimum <= sizes[pool] <= scale.maximum:
            raise ValueError(
                f"{pool}.workers = {sizes[pool]} is not between autoscale.{pool}.minimum = "
                f"{scale.minimum} and autoscale.{pool}.maximum = {scale.maximum}. Change one of them"
            )
        if scale.minimum == scale.maximum:
            raise ValueError(
                f"autoscale.{pool}.minimum = autoscale.{pool}.maximum = {scale.maximum}: the pool "
                "could not change. Raise the maximum, or remove the section"
            )
    if section.gpu_budget is None:
        return
    held = sum(own.workers * own.num_gpus for own in sections.values())
    if held == 0:
        raise ValueError(
            f"autoscale.gpu_budget = {section.gpu_budget:g} with num_gpus = 0 in every pool: no worker "
            "holds a GPU. Remove the budget"
        )
    if held > section.gpu_budget:
        raise ValueError(
            f"autoscale.gpu_budget = {section.gpu_budget:g} is under the {held:g} GPUs that the "
            f"workers at the start hold: {', '.join(f'{p} {size}' for p, size in sizes.items())}. "
            "Raise the budget, or start with fewer workers"
        )
