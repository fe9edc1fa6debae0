"""Metric sums of one step: added over micro-batches, reduced over ranks once, divided once.

Promises:
- the result depends neither on the split of tokens into micro-batches nor on the number of ranks;
- a metric to which no token contributed is omitted, and not reported as 0 or NaN.

Every rank must have added the same names. A rank without tokens adds them with count 0.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Sums


class MetricSums:
    """Sums and counts of metrics by name. A name that ends in `_max` keeps the largest value.

    A sum that is a vector [K], with one count for all entries or one per entry, is K metrics: `name/0`
    to `name/K-1`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: Sums) -> None:
        """Add the sums of one micro-batch. They stay on the device, so nothing is waited for."""
        for name, (total, count) in sums.items():
            total, count = total.detach().double(), count.detach().double()
            count = count.expand_as(total)
            if name.endswith("_max"):
                total = torch.where(count > 0, total, torch.full_like(total, -torch.inf))
            if name in self._sums:
                old_total, old_count = self._sums[name]
                largest = name.endswith("_max")
                total = torch.maximum(old_total, total) if largest else old_total + total
                count = old_count + count
            self._sums[name] = (total, count)

    def reduce(self) -> dict[str, float]:
        """Compute the metrics over the tokens of all ranks, the same on every rank.

        Waits for: all ranks (two collectives), at most until the deadline of the process group.
        """
        if not self._sums:
            return {}
        entries = sorted(self._sums.items())
        names = [own for name, (total, _) in entries for own in _names(name, total)]
        maxima = [n.endswith("_max") for n, (total, _) in entries for _ in range(total.numel())]
        totals = torch.cat([total.reshape(-1) for _, (total, _) in entries])
        counts = torch.cat([count.reshape(-1) for _, (_, count) in entries])
        keeps_largest = torch.tensor(maxima, device=totals.device)
        summed = torch.stack([totals.masked_fill(keeps_largest, 0.0), counts])
        largest = totals.masked_fill(~keeps_largest, -torch.inf)
        dist.all_reduce(summed)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found: dict[str, float] = {}
        columns = (names, maxima, *summed.tolist(), largest.tolist())
        for name, is_maximum, total, count, most in zip(*columns, strict=True):
            if count > 0:
                found[name] = most if is_maximum else total / count
        return found


def _names(name: str, total: Tensor) -> list[str]:
    return [f"{name}/{i}" for i in range(total.numel())] if total.ndim else [name]
