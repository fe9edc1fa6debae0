"""Types of values, and small sections, that several sections share.

Meaning of `num_gpus`: GPUs of one process, or a share of a GPU that other processes use too.

    0           the process runs on the CPU
    below 1     a share: the process fills at most that part of the memory (`memory_share`)
    1, 2, ...   dedicated GPUs; a learner rank drives one

Promises: shares of one GPU never ask for more memory than it has, since Ray keeps their sum at 1 or
less. The GPU's driver decides how processes share its time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.sections.section import Section

if TYPE_CHECKING:
    import torch

Dtype = Literal["float32", "bfloat16"]

Rounding = Literal["nearest", "stochastic"]

FrozenQuantization = Literal["int8"]
"""Storage type of the linear layers of a model that is not trained. It computes in its `dtype`."""

HeadDtype = Literal["float32", "model"]
"""Type of the logits: float32, or that of the model's own head."""

OnStale = Literal["wait", "drop", "reweight"]


class FixedReference(Section):
    """Fixed reference: the policy at the start of reinforcement learning."""

    type: Literal["fixed"] = "fixed"


class PeriodicReference(Section):
    """Reference that is periodically replaced by the policy's live version."""

    type: Literal["periodic"] = "periodic"
    every: PositiveInt
    """Versions between two updates. An update happens when a version goes live that is at least
    this many after the last update's."""


class EmaReference(Section):
    """Reference that is an exponential moving average of the policy's live versions."""

    type: Literal["ema"] = "ema"
    every: PositiveInt = 1
    """Versions between two updates. An update happens when a version goes live that is at least
    this many after the last update's."""
    decay: float = Field(default=0.99, gt=0, lt=1)
    """Weight of the old reference at an update."""


ReferenceUpdate = Annotated[
    FixedReference | PeriodicReference | EmaReference, Field(discriminator="type")
]

FILLABLE_SHARE = 0.9
"""Part of a GPU's memory that processes may fill. The rest is for CUDA and libraries."""


def memory_share(num_gpus: float) -> float:
    """Return the part of each GPU's memory that a process with `num_gpus` may fill."""
    return FILLABLE_SHARE * min(num_gpus, 1.0)


def is_share(num_gpus: float) -> bool:
    return 0.0 < num_gpus < 1.0


def limit_memory(num_gpus: float, device: torch.device | str) -> None:
    """Limit this process to its share of the memory of `device`; no limit for full GPUs and CPUs.

    Beyond the share torch's allocator raises `torch.OutOfMemoryError` here, before another process on
    the GPU lacks memory.
    """
    if is_share(num_gpus):
        import torch

        torch.cuda.set_per_process_memory_fraction(memory_share(num_gpus), device)
