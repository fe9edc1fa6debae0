"""A store of weights with handles on the bytes that it carries."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.read_version import Held
from rlhf_cluster.weights.transports.shared_files import (
    FileSource,
    partial_dir,
)
from tests.support.builders.small_weights import (
    Base,
    Tensors,
    publish,
    write,
)


class Stand:
    """Versions as files below `root`. Shards are paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = FileSource(root)

    def write(self, version: int, tensors: Tensors, num_ranks: int = 2, base: Any = None) -> Any:
        """The shards of a version that is not committed yet, and what `commit` takes."""
        reports = write(self.root, version, tensors, num_ranks, base)
        return [partial_dir(self.root, version) / report.file for report in reports], reports

    def commit(self, version: int, reports: Any, keep: int = 10) -> WeightVersion:
        return store.commit(self.root, version, reports, keep)

    def publish(
        self,
        version: int,
        tensors: Tensors,
        num_ranks: int = 2,
        keep: int = 10,
        base: Base | None = None,
    ) -> WeightVersion:
        return publish(self.root, version, tensors, num_ranks, keep, base)

    def shards(self, version: WeightVersion) -> list[Path]:
        return sorted(Path(version.path).glob("*.safetensors"))

    def load(self, shard: Path) -> bytearray:
        return bytearray(shard.read_bytes())

    def store(self, shard: Path, data: bytes | bytearray) -> None:
        shard.write_bytes(data)

    def lose(self, shard: Path) -> None:
        shard.unlink()

    def read(
        self, version: WeightVersion, held: Held | None = None, verify: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return store.read(version.path, verify, version.digest, held, self.source)

    def find(self) -> list[int]:
        return store.versions(self.root)


def flip(stand: Stand, shard: Path, position: int) -> None:
    data = stand.load(shard)
    data[position] ^= 0x10
    stand.store(shard, data)
