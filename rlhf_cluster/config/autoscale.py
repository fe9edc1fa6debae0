"""The section [autoscale], off where it is not given, and what it must agree on with the others."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.config.base import Section

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


class PoolScale(Section):
    """Between which sizes a pool moves, and how often."""

    minimum: PositiveInt = 1
    maximum: PositiveInt
    cooldown_s: PositiveFloat = 300.0
    """From one change of the pool to the next. The other way it is four times as long."""


class Autoscale(Section):
    """Pools that follow the bottleneck advisor (`rlhf_cluster.autoscale`). A pool without a section of
    its own keeps its size. Sizes at the start are `generation.workers` and `scoring.workers`."""

    generation: PoolScale | None = None
    scoring: PoolScale | None = None
    gpu_budget: float | None = Field(default=None, gt=0)
    """GPUs that both pools hold at most, together. A pool that can spare one gives it to the other."""
    grow_at: float = Field(default=1.1, gt=1)
    """A worker is added where it is foretold to make steps at least this many times as fast."""
    shrink_at: float = Field(default=1.03, ge=1)
    """A worker is taken away where steps are foretold to get at most this many times as slow."""
    steps: int = Field(default=8, ge=4, le=32)
    """Steps with the pools of now that are seen before a change."""

    @property
    def pools(self) -> dict[str, PoolScale]:
        found = {"generation": self.generation, "scoring": self.scoring}
        return {name: scale for name, scale in found.items() if scale is not None}


def check_autoscale(c: RunConfig) -> None:
    section = c.autoscale
    if section is None:
        return
    if not section.pools:
        raise ValueError(
            "[autoscale] without [autoscale.generation] or [autoscale.scoring]: no pool would change "
            "its size. Add one of them with a maximum, or remove the section"
        )
    if section.shrink_at >= section.grow_at:
        raise ValueError(
            f"autoscale.shrink_at = {section.shrink_at:g} is not under autoscale.grow_at = "
            f"{section.grow_at:g}: workers would come and go. Lower the former, or raise the latter"
        )
    sizes = {"generation": c.generation.workers, "scoring": c.scoring.workers}
    for pool, scale in section.pools.items():
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
    gpus = {"generation": c.generation.num_gpus, "scoring": c.scoring.num_gpus}
    held = sum(sizes[pool] * gpus[pool] for pool in sizes)
    if held == 0:
        raise ValueError(
            f"autoscale.gpu_budget = {section.gpu_budget:g} with generation.num_gpus = "
            "scoring.num_gpus = 0: no worker holds a GPU. Remove the budget"
        )
    if held > section.gpu_budget:
        raise ValueError(
            f"autoscale.gpu_budget = {section.gpu_budget:g} is under the {held:g} GPUs that "
            f"generation.workers = {sizes['generation']} and scoring.workers = {sizes['scoring']} hold "
            "at the start. Raise the budget, or start with fewer workers"
        )
