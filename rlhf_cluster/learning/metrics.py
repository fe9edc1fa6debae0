"""Metric sums of one step: added over micro-batches, reduced over ranks once, divided once.

Promises: the result depends neither on how tokens fell into micro-batches nor on the number of
ranks; a metric that no token contributed to is left out rather than reported as 0 or NaN. Every
rank must have added the same names (a rank without tokens adds them with count 0).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cluster.algorithms.base import Sums


class MetricSums:
    """Collects (sum, count) by name; a name that ends in `_max` keeps the largest value."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: Sums) -> None:
        """Add one micro-batch. Stays on the device: nothing is waited for."""
        for name, (total, count) in sums.items():
            total, count = total.detach().double(), count.detach().double()
            if name.endswith("_max"):
                total = torch.where(count > 0, total, torch.full_like(total, -torch.inf))
            if name in self._sums:
                old_total, old_count = self._sums[name]
                largest = name.endswith("_max")
                total = torch.maximum(old_total, total) if largest else old_total + total
                count = old_count + count
            self._sums[name] = (total, count)

    def reduce(self) -> dict[str, float]:
        """The metrics over all ranks' tokens, the same on every rank.

        Waits for all ranks (two collectives); the group's deadline bounds the wait.
        """
        names = sorted(self._sums)
        if not names:
            return {}
        totals = torch.stack([self._sums[n][0] for n in names])
        counts = torch.stack([self._sums[n][1] for n in names])
        keeps_largest = torch.tensor([n.endswith("_max") for n in names], device=totals.device)
        summed = torch.stack([totals.masked_fill(keeps_largest, 0.0), counts])
        largest = totals.masked_fill(~keeps_largest, -torch.inf)
        dist.all_reduce(summed)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found: dict[str, float] = {}
        for name, total, count, most in zip(names, *summed.tolist(), largest.tolist(), strict=True):
            if count > 0:
                found[name] = most if name.endswith("_max") else total / count
        return found
