"""`num_gpus` of the sections: GPUs of one process, or a share of one that other processes use as well.

    0           the process runs on the CPU
    under 1     a share: the process fills at most that part of the memory (`memory_share`)
    1, 2, ...   GPUs of its own; a learner rank drives one

Promises: shares of one GPU that sum up to 1, as Ray sees to, never ask for more memory than it has.
How a GPU divides its time between processes is up to its driver.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig
    from rlhf_cluster.config.sections import Learner

FILLED = 0.9
"""Of a GPU's memory, what is there to be filled; CUDA and libraries keep some for themselves."""


def memory_share(num_gpus: float) -> float:
    """Part of the memory of each of its GPUs that a process may fill."""
    return FILLED * min(num_gpus, 1.0)


def is_share(num_gpus: float) -> bool:
    return 0.0 < num_gpus < 1.0


def check_ranks(learner: Learner) -> None:
    """Raises `ValueError` for GPUs that ranks cannot use."""
    if learner.num_gpus > 1:
        raise ValueError(
            f"learner.num_gpus = {learner.num_gpus:g}: a rank drives one GPU (1), a share of one, or "
            "none (0). Set learner.ranks for more GPUs"
        )
    if is_share(learner.num_gpus) and learner.ranks > 1:
        raise ValueError(
            f"learner.num_gpus = {learner.num_gpus:g} with learner.ranks = {learner.ranks}: NCCL "
            "connects whole GPUs, one for each rank. Set learner.ranks = 1, or learner.num_gpus = 1"
        )


def check_devices(c: RunConfig) -> None:
    """Raises `ValueError` for GPUs that the processes of a run cannot use."""
    check_ranks(c.learner)
    generation = c.generation
    gpus, parallel = generation.num_gpus, generation.tensor_parallel_size
    shared = is_share(gpus) and parallel == 1
    if gpus and gpus != parallel and not shared:
        raise ValueError(
            f"generation.num_gpus = {gpus:g} and generation.tensor_parallel_size = {parallel}: a "
            "worker needs one GPU a tensor-parallel part. Make them equal (or num_gpus = 0 for CPU, or "
            "a share of a GPU with one part)"
        )
    if shared and generation.kv_cache_bytes is None:
        raise ValueError(
            f"generation.num_gpus = {gpus:g} without generation.kv_cache_bytes: vLLM measures what is "
            "free for its cache, and finds what other processes of the GPU have not taken yet. Set "
            "generation.kv_cache_bytes, so that weights and cache fit this share"
        )
    sections = {
        "scoring": c.scoring,
        **{f"scoring.pools.{n}": p for n, p in c.scoring.pools.items()},
    }
    for name, section in sections.items():
        if section.num_gpus > 1 and section.num_gpus % 1:
            raise ValueError(
                f"{name}.num_gpus = {section.num_gpus:g}: a share of a GPU, or whole ones. Round it"
            )
