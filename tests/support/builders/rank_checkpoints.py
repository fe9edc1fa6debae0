"""Saving and loading learner ranks, and all that a rank trains on from, whole and by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.records import LearnerState
from rlhf_cluster.weights import store
from tests.support.builders.tiny_learner import random_groups


def train(learner: LearnerRank, first: int, last: int) -> list[dict[str, float]]:
    """Steps `first` to `last` on batches that follow from their numbers."""
    return [
        dict(
            learner.train_step(
                random_groups(s, num_groups=2, version=s, with_reference=True)
            ).metrics
        )
        for s in range(first, last)
    ]


def save(learner: LearnerRank, root: Path) -> tuple[str, LearnerState]:
    """The version's folder and its numbers. All ranks write, rank 0 puts the version together."""
    state = learner.copy_state()
    report = learner.write_state(str(root))
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, report)
    if dist.get_rank() == 0:
        store.commit(root, state.version, reports, keep=1)
    dist.barrier()
    version = store.latest(root)
    assert version is not None
    return version.path, state


def tensors(learner: LearnerRank) -> dict[str, np.ndarray]:
    """This rank's weights, moments and counts of steps, by model and kind."""
    found = {}
    for owner, updater in learner._updaters.items():
        parts = [("weight", part) for part in updater.model.shards()]
        for kind, part in [*parts, *updater.model.moments()]:
            found[f"{owner}/{kind}/{part.name}"] = part.tensor.numpy().copy()
    return found


def whole(learner: LearnerRank) -> dict[str, np.ndarray]:
    """All ranks' `tensors` put together. Every rank must take part."""
    found: dict[str, np.ndarray] = {}
    for owner, updater in learner._updaters.items():
        parts = [("weight", part) for part in updater.model.shards()]
        for kind, part in [*parts, *updater.model.moments()]:
            full = torch.zeros(int(np.prod(part.shape)))
            if kind != "step" or dist.get_rank() == 0:
                full[part.offset : part.offset + part.tensor.numel()] = part.tensor
            dist.all_reduce(full)
            found[f"{owner}/{kind}/{part.name}"] = full.numpy()
    return found
