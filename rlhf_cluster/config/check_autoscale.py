"""Checks of `[autoscale]` against the other sections; `config.run_config` calls them."""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_cluster.config.pools import pool_sections
from rlhf_cluster.config.run_sections import RunSections


def check_autoscale(c: RunSections) -> Iterator[str]:
    """Refuse sizes and budgets that contradict those of the pools."""
    section = c.autoscale
    if section is None:
        return
    pools = pool_sections(c)
    for pool, scale in section.scales.items():
        if pool not in pools:
            yield (
                f"[autoscale.pools.{pool}] without [scoring.pools.{pool}]: there is no such pool. "
                f"Pools: {', '.join(pools)}"
            )
        elif not scale.minimum <= pools[pool].workers <= scale.maximum:
            yield (
                f"{pool}.workers = {pools[pool].workers} is not between autoscale.{pool}.minimum = "
                f"{scale.minimum} and autoscale.{pool}.maximum = {scale.maximum}. Change one of them"
            )
    if section.gpu_budget is None:
        return
    held = sum(own.workers * own.num_gpus for own in pools.values())
    if held == 0:
        yield (
            "{autoscale.gpu_budget} with num_gpus = 0 in every pool: no worker holds a GPU. Remove the "
            "budget"
        )
    if held > section.gpu_budget:
        sizes = ", ".join(f"{pool} {own.workers}" for pool, own in pools.items())
        yield (
            f"{{autoscale.gpu_budget}} is under the {held:g} GPUs that the workers at the start hold: "
            f"{sizes}. Raise the budget, or start with fewer workers"
        )
