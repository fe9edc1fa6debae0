"""The section [autoscale], off where it is not given, and what it must agree on with the others."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.config.pool_sections import (
    GENERATION,
    SCORING,
)
from rlhf_cluster.sections.section import Section


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
