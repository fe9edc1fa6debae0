"""A share of a GPU is a share of its memory: whoever asks for more than that is refused by torch."""

import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WITH_A_SHARE = """
import torch
from rlhf_cluster.sections.values import limit_memory, memory_share

share = {share}
limit_memory(share, "cuda")
total = torch.cuda.get_device_properties(0).total_memory
held = torch.ones(int(0.8 * memory_share(share) * total), dtype=torch.uint8, device="cuda")
try:
    more = torch.ones(int(0.3 * memory_share(share) * total), dtype=torch.uint8, device="cuda")
    print("more than its share")
except torch.OutOfMemoryError:
    print("kept to it", int(held[:1000].sum()))
"""


def run_with_share(share: float) -> str:
    command = [sys.executable, "-c", WITH_A_SHARE.format(share=share)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_with_a_share_runs_out_of_memory_at_its_share_and_one_with_a_gpu_does_not() -> (
    None
):
    assert run_with_share(0.1) == "kept to it 1000"
    assert run_with_share(1.0) == "more than its share"
