"""Learner ranks as actors, without models: their weights follow from the version."""

from typing import Any

import torch

from actors.services.rank_actors import RankActor, build_learner_rank
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.shards import ShardBase, send_shard

NUMEL = 1 << 20
NUM_RANKS = 2


def weights_of(version: int) -> torch.Tensor:
    """Each differs from the one before in few elements."""
    weights = torch.arange(NUMEL, dtype=torch.float32)
    weights[: version + 1] = -1 - version
    return weights


class FakeRank:
    """What an actor asks of a `LearnerRank`, with weights that follow from the version.

    Its first snapshot is version `first`, each further one the next.
    """

    def __init__(self, rank: int, first: int) -> None:
        self._rank, self._version = rank, first - 1
        self._written: ShardBase | None = None

    def snapshot(self) -> int:
        self._version += 1
        return self._version

    def write_snapshot(self, to: Any, base: int | None = None) -> ShardReport:
        share = NUMEL // NUM_RANKS
        tensor = weights_of(self._version)[self._rank * share : (self._rank + 1) * share]
        part = LocalPart(name="w", shape=(NUMEL,), offset=self._rank * share, tensor=tensor)
        held = self._written if base is not None else None
        assert base is None or (held is not None and held.version == base)
        report = send_shard(to, self._version, self._rank, [part], held)
        self._written = ShardBase(version=self._version, parts={"w": part})
        return report


class FakeRankActor(RankActor):
    """Actor of a `FakeRank`, whose first version `setup` gets instead of a meeting point."""

    def __init__(self, config: Any, model_dir: str, rank: int) -> None:
        super().__init__(config, model_dir, rank, build_learner_rank)
        self._refusals: list[tuple[int, str]] = []

    def setup(self, init_method: str) -> dict[str, Any]:
        self._rank = FakeRank(self._number, int(init_method))
        self._shapes = {"w": (NUMEL,)}
        return {}

    def refused(self, version: int, reason: str) -> None:
        self._refusals.append((version, reason))
        super().refused(version, reason)

    def refusals(self) -> list[tuple[int, str]]:
        return self._refusals
