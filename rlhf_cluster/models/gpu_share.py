"""Memory limit of a process with a share of a GPU.

Torch raises in the process that exceeds its share, before another process on the GPU lacks memory.
Source: `torch.cuda.set_per_process_memory_fraction`, which bounds torch's allocator.
`sections.values.FILLABLE_SHARE` leaves memory free for what CUDA and libraries use in addition.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.sections.values import (
    is_share,
    memory_share,
)

if TYPE_CHECKING:
    import torch


def limit_memory(num_gpus: float, device: torch.device | str) -> None:
    """Limit this process to its share of the memory of `device`; no limit for full GPUs and CPUs.

    Beyond the share torch raises `torch.OutOfMemoryError`.
    """
    if is_share(num_gpus):
        import torch

        torch.cuda.set_per_process_memory_fraction(memory_share(num_gpus), device)
