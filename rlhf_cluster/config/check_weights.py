"""What `[weights]` must agree on with the other sections; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.sections import Weights

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig

_WITHOUT_HOST_COPY = {
    "nccl": "its receivers form one fixed group, so that a worker that dies or joins stops them all",
    "ipc": "it needs a learner rank on every GPU that generates, and here the pools have GPUs apart",
}


def check_weights(c: RunConfig) -> None:
    """Raises `ValueError` for a transport that cannot carry this run's versions."""
    transport = c.weights.transport
    if (why := _WITHOUT_HOST_COPY.get(transport)) is not None:
        raise ValueError(
            f"weights.transport = {transport!r}: vLLM's own backend writes into the model what it "
            f"receives, before anything can be verified, a broken transfer costs the engine, "
            f"and {why}. Use 'files' (weights.root under /dev/shm on one machine), or 'ray'"
        )
    if transport == "files" and c.weights.durable_every != Weights().durable_every:
        raise ValueError(
            f"weights.durable_every = {c.weights.durable_every} with weights.transport = 'files': "
            "every version is written to files. Remove it, or set transport = 'ray'"
        )
    if transport != "ray":
        return
    parallel, update = c.generation.tensor_parallel_size, c.scoring.reference_update.type
    if parallel > 1:
        raise ValueError(
            f"weights.transport = 'ray' with generation.tensor_parallel_size = {parallel}: vLLM runs "
            "the parts of a worker in processes of its own, which Ray's object store does not know. "
            "Use 'files' (weights.root under /dev/shm on one machine), or one GPU a worker"
        )
    if update != "fixed":
        raise ValueError(
            f"weights.transport = 'ray' with scoring.reference_update.type = {update!r}: a reference "
            "that moves is made from files of any version, and most have none. Use 'files', or a "
            "fixed reference"
        )
