"""The section [autoscale]. Without it, pools keep their sizes."""

from __future__ import annotations

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.config.pool_sections import (
    GENERATION,
    SCORING,
)
from rlhf_cluster.sections.section import Section


class PoolScale(Section):
    """Smallest and largest size of a pool, and the pause between changes."""

    minimum: PositiveInt = 1
    maximum: PositiveInt
    cooldown_s: PositiveFloat = 300.0
    """Seconds from one change of the pool to the next in the same direction. A change in the opposite
    direction waits four times as long."""


class Autoscale(Section):
    """Pools that grow and shrink with the bottleneck advisor (`rlhf_cluster.run.autoscaler`).

    A pool without a section here keeps its size. The size at the start is `generation.workers` and
    its counterparts in the other pools' sections.
    """

    generation: PoolScale | None = None
    scoring: PoolScale | None = None
    pools: dict[str, PoolScale] = Field(default_factory=dict)
    """Sections for the pools of `[scoring.pools]`, by name."""
    gpu_budget: float | None = Field(default=None, gt=0)
    """Most GPUs that the pools hold together. A pool that can spare a GPU passes it to another pool."""
    grow_at: float = Field(default=1.1, gt=1)
    """Smallest predicted speedup of steps for which a worker is added."""
    shrink_at: float = Field(default=1.03, ge=1)
    """Largest predicted slowdown of steps at which a worker is removed."""
    steps: int = Field(default=8, ge=4, le=32)
    """Steps measured with the current pools before a change."""

    @property
    def scales(self) -> dict[str, PoolScale]:
        """Section of each pool that changes its size, by the pool's name."""
        found = {GENERATION: self.generation, SCORING: self.scoring, **self.pools}
        return {name: scale for name, scale in found.items() if scale is not None}
