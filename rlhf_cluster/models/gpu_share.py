"""A process with a share of a GPU keeps to it: torch raises in that process, before another one of
the GPU has to miss what it was promised.

Source: `torch.cuda.set_per_process_memory_fraction`, which bounds torch's allocator; what CUDA and
libraries take beside it is left free by `sections.gpu_shares.FILLED`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.sections.gpu_shares import (
    is_share,
    memory_share,
)

if TYPE_CHECKING:
    import torch


def keep_to_share(num_gpus: float, device: torch.device | str) -> None:
    """From now on `torch.OutOfMemoryError` where this process would fill more of `device` than its
    share; whole GPUs and CPUs are left as they are."""
    if is_share(num_gpus):
        import torch

        torch.cuda.set_per_process_memory_fraction(memory_share(num_gpus), device)
