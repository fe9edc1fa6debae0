"""Checks of `[autoscale]` against the other sections; `config.run_config` calls them."""

from __future__ import annotations

from rlhf_cluster.config.pool_sections import pool_sections
from rlhf_cluster.config.run_sections import RunSections


def check_autoscale(c: RunSections) -> None:
    """Check that `[autoscale]` agrees with the pools and can change a size. Raises `ValueError`."""
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
