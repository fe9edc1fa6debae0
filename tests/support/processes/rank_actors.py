"""Learner ranks as actors, without models: their weights follow from the version."""

from typing import Any

import torch

from actors.services.learner_actors import LearnerActor
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.shards import ShardBase, send_shard

NUMEL = 1 << 20
NUM_RANKS = 2


def weights_of(version: int) -> torch.Tensor:
    """Each differs from the one before in few elements."""
    weights = torch.arange(NUMEL, dtype=torch.float32)
    weights[: version + 1] = -1 - version
    return weights


class _Rank:
    """What an actor asks of a `LearnerRank`, with weights that follow from the version."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._version = -1
        self._written: ShardBase | None = None

    def snapshot_of(self, version: int) -> int:
        self._version = version
        return version

    def write_snapshot(self, to: Any, base: int | None = None) -> ShardReport:
        share = NUMEL // NUM_RANKS
        tensor = weights_of(self._version)[self._rank * share : (self._rank + 1) * share]
        part = LocalPart(name="w", shape=(NUMEL,), offset=self._rank * share, tensor=tensor)
        held = self._written if base is not None else None
        assert base is None or (held is not None and held.version == base)
        report = send_shard(to, self._version, self._rank, [part], held)
        self._written = ShardBase(version=self._version, parts={"w": part})
        return report


class RankActor(LearnerActor):
    """A learner rank without a model. `snapshot` takes the next version."""

    def setup(self, init_method: str) -> dict[str, Any]:
        self._rank = _Rank(self._number)
        self._shapes = {"w": (NUMEL,)}
        self._next, self._refusals = int(init_method), []
        return {}

    def snapshot(self) -> int:
        self._next += 1
        return self._rank.snapshot_of(self._next - 1)

    def refused(self, version: int, reason: str) -> None:
        self._refusals.append((version, reason))
        super().refused(version, reason)

    def refusals(self) -> list[tuple[int, str]]:
        return self._refusals
