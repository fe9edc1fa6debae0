"""`num_gpus` of the sections: GPUs of one process, or a share of one that other processes use as well.

    0           the process runs on the CPU
    under 1     a share: the process fills at most that part of the memory (`memory_share`)
    1, 2, ...   GPUs of its own; a learner rank drives one

Promises: shares of one GPU that sum up to 1, as Ray sees to, never ask for more memory than it has.
How a GPU divides its time between processes is up to its driver.
"""

from __future__ import annotations

FILLED = 0.9
"""Of a GPU's memory, what is there to be filled; CUDA and libraries keep some for themselves."""


def memory_share(num_gpus: float) -> float:
    """Part of the memory of each of its GPUs that a process may fill."""
    return FILLED * min(num_gpus, 1.0)


def is_share(num_gpus: float) -> bool:
    return 0.0 < num_gpus < 1.0
