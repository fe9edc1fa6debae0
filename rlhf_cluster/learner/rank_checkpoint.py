"""Saving and loading of a learner rank's training state.

    MODEL/weight/NAME   MODEL/exp_avg/NAME   MODEL/exp_avg_sq/NAME   MODEL/step/NAME

MODEL is `policy` or `critic`, NAME that of a trained parameter in its module. Frozen parameters are not
saved, because the model folder has them. Other tensors that change have separate names (`further`). A
checkpoint is a version in the format of the weight store, in float32. Each rank writes its shards, as
ranges of flattened tensors, and nothing is gathered.

Promises:
- loaded values are bitwise identical to saved ones, whatever the number of ranks and the backend were
  at saving and are at loading;
- every tensor is verified before it is used;
- nothing is unpickled.

A rank that loads reads all tensors, one at a time, and keeps its shards.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch

from rlhf_cluster.errors import CheckpointError
from rlhf_cluster.learner.publish import host_copy
from rlhf_cluster.learner.sharding.sharded_model import STEP
from rlhf_cluster.learner.step.optimizer_step import Updater
from rlhf_cluster.records import LearnerState
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.store import read, write_shard

WEIGHT = "weight"


class Stateful(Protocol):
    """Object with a few numbers as its state: an algorithm, a stage."""

    def state(self) -> dict[str, float]: ...

    def load_state(self, state: dict[str, float]) -> None: ...


class StateCopies:
    """Copy of one rank's state in host memory, until it is written."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._lock = threading.Lock()
        self._taken: tuple[int, list[LocalPart]] | None = None

    def copy(
        self,
        updaters: Mapping[str, Updater],
        algorithm: Stateful,
        version: int,
        further: Iterable[LocalPart] = (),
    ) -> LearnerState:
        """Copy all state that training resumes from; call between two steps.

        Args:
            further: other tensors, named like those of a model, but with another kind.
        Raises:
            CheckpointError: no step of reinforcement learning was taken yet.
        """
        if not updaters:
            raise CheckpointError(
                f"learner rank {self._rank}: nothing to save before the first step"
            )
        # tensors that every rank has completely are saved by rank 0 only
        own = (p for p in _tensors(updaters) if self._rank == 0 or p.name.split("/")[1] != STEP)
        parts = host_copy(itertools.chain(own, further), torch.float32)
        with self._lock:
            self._taken = (version, parts)
        return LearnerState(
            version=version,
            num_bytes=sum(part.tensor.nbytes for part in parts),
            skips={model: updater.skips for model, updater in updaters.items()},
            algorithm=algorithm.state(),
        )

    def write(self, root: str | Path) -> ShardReport:
        """Write the copy as this rank's shard of its version below `root`, and forget it.

        Raises:
            CheckpointError: there is no copy.
            WeightError: it cannot be written.
        """
        with self._lock:
            taken, self._taken = self._taken, None
        if taken is None:
            raise CheckpointError(f"learner rank {self._rank} has no copy of its state to write")
        version, parts = taken
        return write_shard(root, version, self._rank, parts, fsync=True)


@torch.no_grad()
def load(
    folder: str | Path,
    state: LearnerState,
    updaters: Mapping[str, Updater],
    algorithm: Stateful,
    further: Iterable[LocalPart] = (),
) -> None:
    """Overwrite weights, moments, counters and `further` tensors by those of a checkpoint.

    The checkpoint is the version in `folder` and `state`.

    Raises:
        WeightError: a tensor is damaged or missing.
        CheckpointError: the checkpoint is of other parameters, or of another algorithm.
    """
    targets = {part.name: part for part in itertools.chain(_tensors(updaters), further)}
    weights: dict[str, list[LocalPart]] = {model: [] for model in updaters}
    for name, tensor in read(folder):
        target = targets.pop(name, None)
        if target is None or target.shape != tuple(tensor.shape):
            here = f"has shape {list(target.shape)}" if target else "is not trained"
            raise CheckpointError(
                f"{folder}: {name} has shape {list(tensor.shape)}, and {here} here. {_CURE}"
            )
        own = tensor.reshape(-1)[target.offset : target.offset + target.tensor.numel()]
        model, kind, parameter = name.split("/", 2)
        if kind == WEIGHT:
            copied = own.to(target.tensor.device, copy=True)
            weights[model].append(replace(target, name=parameter, tensor=copied))
        else:
            target.tensor.copy_(own)
    if targets or state.skips.keys() != updaters.keys():
        raise CheckpointError(f"{folder}: lacks {sorted(targets)[:3]}, trained here. {_CURE}")
    for model, updater in updaters.items():
        updater.model.assign(weights[model])
        updater.skips = state.skips[model]
    algorithm.load_state(state.algorithm)


_CURE = "Continue the run with the model, adapters and algorithm that it was saved with"


def _tensors(updaters: Mapping[str, Updater]) -> Iterator[LocalPart]:
    """Yield views of all tensors of the updaters that are saved, with their saved names."""
    for owner, updater in updaters.items():
        model = updater.model
        trained = {name for name, p in model.module.named_parameters() if p.requires_grad}
        for part in model.shards():
            if part.name in trained:
                yield replace(part, name=f"{owner}/{WEIGHT}/{part.name}")
        for key, part in model.moments():
            yield replace(part, name=f"{owner}/{key}/{part.name}")
