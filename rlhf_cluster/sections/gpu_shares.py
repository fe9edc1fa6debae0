"""Meaning of `num_gpus`: GPUs of one process, or a share of a GPU that other processes use too.

    0           the process runs on the CPU
    below 1     a share: the process fills at most that part of the memory (`memory_share`)
    1, 2, ...   dedicated GPUs; a learner rank drives one

Promises: shares of one GPU never ask for more memory than it has, since Ray keeps their sum at 1 or
less. The GPU's driver decides how processes share its time.
"""

from __future__ import annotations

FILLABLE_SHARE = 0.9
"""Part of a GPU's memory that processes may fill. The rest is for CUDA and libraries."""


def memory_share(num_gpus: float) -> float:
    """Return the part of each GPU's memory that a process with `num_gpus` may fill."""
    return FILLABLE_SHARE * min(num_gpus, 1.0)


def is_share(num_gpus: float) -> bool:
    return 0.0 < num_gpus < 1.0
