"""What `[weights]` must agree on with the other sections; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.sections import Weights

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_weights(c: RunConfig) -> None:
    """Raises `ValueError` for a transport that cannot carry this run's versions."""
    transport = c.weights.transport
    if transport == "ipc":
        raise ValueError(
            "weights.transport = 'ipc': CUDA shares memory only between processes of one GPU, and it "
            "saves nothing there, since every version goes through host memory to be verified. Use "
            "'files' with weights.root under /dev/shm, or 'nccl' between GPUs"
        )
    if transport == "files" and c.weights.durable_every != Weights().durable_every:
        raise ValueError(
            f"weights.durable_every = {c.weights.durable_every} with weights.transport = 'files': "
            "every version is written to files. Remove it, or set another transport"
        )
    if c.weights.mirror is not None and transport != "files":
        raise ValueError(
            f"weights.mirror with weights.transport = {transport!r}: it mirrors files. Remove one "
            "of them"
        )
    if transport == "nccl":
        _check_gpus(c)
    if transport != "files":
        _check_single_processes(c)


def _check_gpus(c: RunConfig) -> None:
    gpus = {"learner": c.learner.num_gpus, "generation": c.generation.num_gpus}
    for section, num_gpus in gpus.items():
        if num_gpus < 1:
            raise ValueError(
                f"weights.transport = 'nccl' with {section}.num_gpus = {num_gpus:g}: NCCL connects "
                f"whole GPUs, one for each process. Set {section}.num_gpus, or transport = 'ray'"
            )


def _check_single_processes(c: RunConfig) -> None:
    transport = c.weights.transport
    parallel, update = c.generation.tensor_parallel_size, c.scoring.reference_update.type
    if parallel > 1:
        raise ValueError(
            f"weights.transport = {transport!r} with generation.tensor_parallel_size = {parallel}: "
            "vLLM runs the parts of a worker in processes of its own, which cannot ask Ray for "
            "versions. Use 'files' (weights.root under /dev/shm on one machine), or one GPU a worker"
        )
    if update != "fixed":
        raise ValueError(
            f"weights.transport = {transport!r} with scoring.reference_update.type = {update!r}: a "
            "reference that moves is made from files of any version, and most have none. Use "
            "'files', or a fixed reference"
        )
