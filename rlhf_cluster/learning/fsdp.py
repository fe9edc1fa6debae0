"""Sharding with FSDP2: process group, mesh, sharded policy, gradient norm, local shards.

Promises: one code path for one rank and for many; parameters, gradients and AdamW's moments are
float32 (`assert_float32`), also when the passes compute in bfloat16; `local_parts` reads a rank's
own memory only, so it can run at any time without the other ranks.

FSDP AVERAGES gradients over the ranks. A loss that is a sum over tokens is therefore multiplied by
`world size / tokens of all ranks` before `backward`, which gives the mean over all tokens.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterable, Iterator
from typing import Any, cast
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlhf_cluster.errors import ConfigError, StalledError
from rlhf_cluster.learning.policy import PolicyLM, checkpoint_name
from rlhf_cluster.weights.manifest import LocalPart


def join_group(
    init_method: str,
    rank: int,
    world_size: int,
    device_type: str,
    start_timeout_s: float,
    collective_timeout_s: float,
) -> DeviceMesh:
    """Meet the other ranks and build the data-parallel mesh.

    Waits for all ranks to reach `init_method` (tcp://host:port, served by rank 0), at most
    `start_timeout_s`, so that ranks may take unequal time to load. After that every collective has
    `collective_timeout_s`.

    Raises:
        ConfigError: an address that is not tcp://host:port.
        StalledError: not all ranks came.
    """
    address = urlparse(init_method)
    if address.scheme != "tcp" or address.hostname is None or address.port is None:
        raise ConfigError(f"init_method = {init_method!r}: expected tcp://host:port")
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address.hostname,
            address.port,
            world_size,
            is_master=rank == 0,
            timeout=datetime.timedelta(seconds=start_timeout_s),
            wait_for_workers=True,
        )
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout_s),
        )
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("data",))
    except RuntimeError as error:
        raise StalledError(
            f"learner rank {rank}: the group of {world_size} ranks did not form at {init_method} "
            f"within {start_timeout_s:g} s ({error}). Look for a rank that did not start, or raise "
            "run.start_timeout_s"
        ) from error


def shard(
    policy: PolicyLM,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
) -> PolicyLM:
    """Shard every decoder layer, then the rest, in place; returns the policy in training mode.

    With `compute_dtype` bfloat16 the passes run in it and gradients are reduced in float32.

    Raises:
        ConfigError: the model's decoder layers cannot be found.
    """
    layers = _decoder_layers(policy)
    if gradient_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(policy, mesh=mesh, mp_policy=precision)
    return policy.train()


def _decoder_layers(policy: PolicyLM) -> list[torch.nn.Module]:
    names = set(policy.lm._no_split_modules or ())
    layers = [m for m in policy.lm.modules() if type(m).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{type(policy.lm).__name__} names no decoder layers to shard by (_no_split_modules = "
            f"{sorted(names)}). Use another model"
        )
    return layers


def assert_float32(policy: PolicyLM, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Raise `ConfigError` if a master weight or a moment is not float32.

    In bfloat16 an update under 1/256 of a weight's size is lost altogether.
    """
    for name, parameter in policy.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(f"master weight {name} is {parameter.dtype}, must be float32")
    for state in optimizer.state.values() if optimizer else ():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype != torch.float32:
                raise ConfigError(f"optimizer state {key} is {value.dtype}, must be float32")


def adamw(
    policy: PolicyLM, beta1: float, beta2: float, weight_decay: float
) -> torch.optim.Optimizer:
    """AdamW over the trainable parameters; weight decay on matrices only. `Updater` sets rates."""
    trainable = [p for p in policy.parameters() if p.requires_grad]
    return torch.optim.AdamW(
        [
            {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": weight_decay},
            {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.0,
        betas=(beta1, beta2),
        foreach=True,
    )


def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> float:
    """Scale gradients so that their norm over all ranks is at most `max_norm`.

    Returns the norm before clipping, the same on every rank. When it is not finite the gradients
    are left as they are; the caller must not step.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    value = norm.item()
    if math.isfinite(value):
        torch.nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return value


def local_parts(policy: PolicyLM) -> Iterator[LocalPart]:
    """This rank's share of every tensor of the checkpoint, as views, without communication.

    Names are those of the Hugging Face checkpoint; tied tensors appear once, under their first
    name. A share may be empty. Buffers that belong to the checkpoint come from rank 0 whole.
    """
    for name, parameter in policy.named_parameters():
        tensor = parameter.detach()
        yield _local_part(checkpoint_name(name), tensor)
    if dist.get_rank() == 0:
        for name, buffer in _checkpoint_buffers(policy):
            flat = buffer.detach().reshape(-1)
            yield LocalPart(name=name, shape=tuple(buffer.shape), offset=0, tensor=flat)


def tensor_shapes(policy: PolicyLM) -> dict[str, tuple[int, ...]]:
    """Name and whole shape of every tensor that all ranks' `local_parts` make up together."""
    shapes = {checkpoint_name(n): tuple(p.shape) for n, p in policy.named_parameters()}
    return shapes | {n: tuple(b.shape) for n, b in _checkpoint_buffers(policy)}


def _local_part(name: str, tensor: Tensor) -> LocalPart:
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        raise ConfigError(f"parameter {name} is not sharded; shard the policy first")
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    # shards are runs of whole rows, so they are contiguous in the flattened tensor
    offset = offsets[0] * math.prod(shape[1:]) if shape else 0
    return LocalPart(name=name, shape=shape, offset=offset, tensor=tensor.to_local().reshape(-1))


def _checkpoint_buffers(policy: PolicyLM) -> Iterator[tuple[str, Tensor]]:
    stored = cast(dict[str, Any], policy.lm.state_dict(keep_vars=True))
    for name, buffer in policy.named_buffers():
        if checkpoint_name(name) in stored:
            yield checkpoint_name(name), buffer
