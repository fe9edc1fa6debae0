"""Every byte of a chain of versions, flipped in turn."""

from pathlib import Path

import torch

from rlhf_cluster.errors import WeightError
from tests.support.builders.small_weights import assert_same
from tests.support.builders.weight_transports import (
    Stand,
    flip,
)


def test_every_flipped_byte_of_a_chain_is_found(tmp_path: Path) -> None:
    stand = Stand(tmp_path)
    was = {"a": torch.arange(60, dtype=torch.float32), "b": torch.ones(30)}
    now = {name: tensor.clone() for name, tensor in was.items()}
    now["a"][7] = 0.5
    now["b"][2] = -1
    base = stand.publish(0, was, num_ranks=1)
    version = stand.publish(1, now, num_ranks=1, base=(0, was))
    for shard in (*stand.shards(base), *stand.shards(version)):
        for position in range(len(stand.load(shard))):
            flip(stand, shard, position)
            try:
                found = dict(stand.read(version))
            except WeightError:
                continue
            finally:
                flip(stand, shard, position)
            # zstd leaves one bit of its frames unused; what comes out is what was published.
            assert_same(found, now)
            assert shard in stand.shards(version)
    assert_same(dict(stand.read(version)), now)
