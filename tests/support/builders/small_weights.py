"""Small weights, and ranks that write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.shards import ShardBase

Tensors = Mapping[str, torch.Tensor]
Base = tuple[int, Tensors]


def small_model(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    """A matrix of several hash chunks, a vector, a scalar."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(300, 257, generator=generator).to(dtype),
        "model.norm.weight": torch.randn(257, generator=generator).to(dtype),
        "scale": torch.randn((), generator=generator).to(dtype),
    }


def split(
    tensors: Tensors, cuts: Mapping[str, Sequence[int]], num_ranks: int
) -> list[list[LocalPart]]:
    """Each tensor cut at `cuts[name]` (num_ranks - 1 elements), one range a rank, some empty."""
    ranks: list[list[LocalPart]] = [[] for _ in range(num_ranks)]
    for name, tensor in tensors.items():
        flat = tensor.reshape(-1)
        borders = [0, *sorted(cuts[name]), flat.numel()]
        for rank, (a, b) in enumerate(pairwise(borders)):
            part = LocalPart(name=name, shape=tuple(tensor.shape), offset=a, tensor=flat[a:b])
            ranks[rank].append(part)
    return ranks


def write(
    root: Path, version: int, tensors: Tensors, num_ranks: int = 2, base: Base | None = None
) -> list[ShardReport]:
    """`base`: the number and the tensors of a version that the same ranks published."""
    bases = shard_bases(base, num_ranks)
    return [
        store.write_shard(root, version, rank, parts, base=bases[rank])
        for rank, parts in enumerate(split_evenly(tensors, num_ranks))
    ]


def shard_bases(base: Base | None, num_ranks: int) -> list[ShardBase | None]:
    """What each rank holds of `base`."""
    if base is None:
        return [None] * num_ranks
    number, was = base
    return [
        ShardBase(version=number, parts={part.name: part for part in parts})
        for parts in split_evenly(was, num_ranks)
    ]


def split_evenly(tensors: Tensors, num_ranks: int) -> list[list[LocalPart]]:
    return split(tensors, _even_cuts(tensors, num_ranks), num_ranks)


def publish(
    root: Path,
    version: int,
    tensors: Tensors,
    num_ranks: int = 2,
    keep: int = 10,
    base: Base | None = None,
) -> WeightVersion:
    return store.commit(root, version, write(root, version, tensors, num_ranks, base), keep)


def stepped(tensors: Tensors, seed: int, share: float = 0.02) -> dict[str, torch.Tensor]:
    """Copies in which about `share` of the elements moved a little."""
    generator = torch.Generator().manual_seed(seed)
    moved = {}
    for name, tensor in tensors.items():
        chosen = torch.rand(tensor.shape, generator=generator) < share
        moved[name] = torch.where(chosen, tensor * 1.01, tensor)
    return moved


def _even_cuts(tensors: Tensors, num_ranks: int) -> dict[str, list[int]]:
    return {
        name: [tensor.numel() * k // num_ranks for k in range(1, num_ranks)]
        for name, tensor in tensors.items()
    }


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor), name
