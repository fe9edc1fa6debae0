"""Metric sums reduced as the learner reduces them, by one rank alone."""

import torch.distributed as dist

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.learner.step.passes import MetricSums


def reduced(*micro_batches: Sums) -> dict[str, float]:
    """What a step reports of these micro-batches, before anything is derived from it."""
    sums = MetricSums()
    for batch in micro_batches:
        sums.add(batch)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        return sums.reduce()
    finally:
        dist.destroy_process_group()
