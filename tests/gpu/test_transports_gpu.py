"""Shards between GPUs through NCCL: the cases of `tests/component/test_weight_pairs.py`."""

import os

import pytest
import torch

from tests.support.processes.pair_readers import check_transfers

NUM_DEVICES = torch.cuda.device_count()

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(NUM_DEVICES < 2, reason="needs two CUDA devices: NCCL connects whole GPUs"),
]


def test_readers_that_raise_die_or_hang_in_the_middle_cost_nobody_else_and_the_next_is_read() -> (
    None
):
    """The ranks are on the first GPU of this process. Two ranks then share one, and readers the rest:
    each pair still is of two GPUs."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    numbers = [int(n) for n in visible.split(",")] if visible else list(range(NUM_DEVICES))
    others = numbers[1:]
    check_transfers("nccl", [others[i % len(others)] for i in range(3)])
