"""Reads weights into a model that FSDP2 has sharded on the meta device: every rank its rows alone.

    outline_policy (parameters on the meta device) -> fsdp2.shard -> fill -> check_policy

Promises:
- a rank reads only the bytes of its shards, and holds them and at most `CHUNK_BYTES` more;
- the result is bitwise that of sharding the loaded model: the same conversion of the same elements;
- parameters that are not on the meta device (a head of values) stay as they are, tied parameters stay
  tied, and persistent buffers that the files hold are read whole;
- an error names tensor, file and rank.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlhf_cluster.errors import WeightError
from rlhf_cluster.learner.step.critic import ValueLM, check_value_model
from rlhf_cluster.models.model_folder import checkpoint_files
from rlhf_cluster.models.policy_model import PolicyLM, check_policy, checkpoint_name

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of malloc.h
CHUNK_BYTES = 64 << 20
"""Most bytes of a file that are read at once, but for a row that has more."""


def load_shards(
    model: PolicyLM | ValueLM,
    model_dir: str | Path,
    device: torch.device,
    compute_dtype: torch.dtype,
    rank: int,
) -> None:
    """Read the weights of a model that was sharded as an outline, and check the model.

    Nothing happens to a model that was loaded whole. Every rank must take part.

    Raises:
        WeightError: as `fill`.
        ConfigError: the model does not keep the promises of `models.policy_model`.
    """
    if not any(parameter.is_meta for parameter in model.parameters()):
        return
    with _return_freed_memory():
        if isinstance(model, PolicyLM):
            fill(model, model_dir, device, rank, checkpoint_name)
            trainable = any(parameter.requires_grad for parameter in model.parameters())
            check_policy(model, compute_dtype, trainable)
        else:
            prefix = str(cast(Any, model.lm).base_model_prefix)
            fill(model, model_dir, device, rank, lambda n: f"{prefix}.{n.removeprefix('lm.')}")
            check_value_model(model, compute_dtype)
        cast(FSDPModule, model).reshard()  # a pass without a backward pass leaves the root gathered


@contextmanager
def _return_freed_memory() -> Iterator[None]:
    """Let glibc return every freed block to the system.

    By default it soon keeps what is freed: then the layers that the checks gather in turn on a CPU stay
    in the process, and are several times its shards. Training keeps glibc's way, where the same blocks
    are needed in every step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        yield
        return
    mallopt(_MMAP_THRESHOLD, 128 << 10)
    try:
        yield
    finally:
        mallopt(_MMAP_THRESHOLD, 32 << 20)  # where glibc's own adjustment ends
        mallopt(_TRIM_THRESHOLD, 64 << 20)


@torch.no_grad()
def fill(
    module: nn.Module,
    model_dir: str | Path,
    device: torch.device,
    rank: int,
    stored_name: Callable[[str], str],
) -> None:
    """Allocate this rank's shards of all parameters on the meta device, and read weights and buffers.

    Args:
        module: sharded over dimension 0 by `fully_shard`.
        stored_name: maps the name of a parameter to that of its tensor in the files.
    Raises:
        WeightError: a tensor is missing, has another shape, or cannot be read.
    """
    missing = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    tied = _group_owners(module)
    module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t)
    for (first, name), *others in tied:
        for other, other_name in others:  # `_apply` made a parameter for each of their names
            other._parameters[other_name] = first._parameters[name]
    by_file: dict[Path, list[str]] = defaultdict(list)
    files = checkpoint_files(model_dir)
    for name in missing:
        stored = stored_name(name)
        if stored not in files:
            raise WeightError(
                f"learner rank {rank}: no file of {model_dir} has the tensor {stored} of the "
                f"parameter {name}. Save the model again, with all of its weights"
            )
        by_file[files[stored]].append(name)
    for name in _persistent_buffers(module):
        if stored_name(name) in files:
            by_file[files[stored_name(name)]].append(name)
    for file, names in by_file.items():
        _read_file(module, file, names, rank, stored_name)


def _read_file(
    module: nn.Module, file: Path, names: list[str], rank: int, stored_name: Callable[[str], str]
) -> None:
    reading = ""
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in names:
                reading = stored_name(name)
                owner, _, own_name = name.rpartition(".")
                target = getattr(module.get_submodule(owner), own_name)
                stored = tensors.get_slice(reading)
                shape = tuple(stored.get_shape())
                if shape != tuple(target.shape):
                    raise ValueError(
                        f"its shape is {list(shape)}, the model has {list(target.shape)}"
                    )
                if isinstance(target, DTensor):
                    _read_rows(target, stored, shape)
                else:
                    target.copy_(tensors.get_tensor(reading))
    except (OSError, SafetensorError, ValueError) as error:
        raise WeightError(
            f"learner rank {rank}: tensor {reading or names[0]} of {file} cannot be read ({error}). "
            "If its disk is well, copy the file again from where the model came from"
        ) from error


def _persistent_buffers(module: nn.Module) -> Iterator[str]:
    """Yield the names of the buffers that a checkpoint has; the configuration gives the others."""
    for name, _ in module.named_buffers():
        owner, _, own_name = name.rpartition(".")
        if own_name not in module.get_submodule(owner)._non_persistent_buffers_set:
            yield name


def _read_rows(parameter: DTensor, stored: Any, shape: tuple[int, ...]) -> None:
    """Read this rank's rows of a parameter of `shape` from a slice of its file."""
    local: Tensor = parameter.to_local()
    if not local.numel():
        return
    _, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    rows = max(1, CHUNK_BYTES // (4 * math.prod(shape[1:])))
    for begin in range(0, len(local), rows):
        end = min(begin + rows, len(local))
        local[begin:end].copy_(stored[offsets[0] + begin : offsets[0] + end])


def _group_owners(module: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    """Return the owners of every parameter that several modules share."""
    owners: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            owners[id(parameter)].append((owner, name))
    return [group for group in owners.values() if len(group) > 1]
