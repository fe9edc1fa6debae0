"""Sharding with FSDP2, behind `sharded_model.ShardedModel`.

One rank and many ranks use the same code. Every decoder layer is gathered for its own passes only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.sharding.sharded_model import (
    MOMENTS,
    STEP,
    AdamWSettings,
    adamw,
    adamw_state,
)
from rlhf_cluster.weights.manifest import LocalPart

M = TypeVar("M", bound=nn.Module)


class Fsdp2Model:
    """`sharded_model.ShardedModel` of a module that `shard` has sharded, with its AdamW."""

    def __init__(self, module: nn.Module, settings: AdamWSettings) -> None:
        self._module = module
        self._optimizer = adamw(module, settings, foreach=True)

    @property
    def module(self) -> nn.Module:
        return self._module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._module.named_parameters():
            if parameter.grad is not None:
                yield name, cast(DTensor, parameter.grad).to_local()

    def step(self, learning_rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self.clear_gradients()

    def clear_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def reset_optimizer(self) -> None:
        self._optimizer.state.clear()

    def shards(self) -> Iterator[LocalPart]:
        return shards_of(self._module)

    def whole(self, name: str) -> Tensor:
        return cast(DTensor, self._module.get_parameter(name).detach()).full_tensor()

    def assign(self, parts: Iterable[LocalPart]) -> None:
        own = {part.name: part.tensor for part in self.shards()}
        for part in parts:
            own[part.name].copy_(part.tensor)

    def moments(self) -> Iterator[tuple[str, LocalPart]]:
        for name, parameter in self._module.named_parameters():
            if parameter.requires_grad:
                state = adamw_state(self._optimizer, parameter)
                for key in MOMENTS:
                    yield key, _local_part(name, state[key])
                yield STEP, LocalPart(name=name, shape=(1,), offset=0, tensor=state[STEP].view(1))

    def close(self) -> None:
        pass


def shards_of(module: nn.Module) -> Iterator[LocalPart]:
    """Yield this rank's shard of every parameter of a sharded module, by its name; flat views."""
    for name, parameter in module.named_parameters():
        yield _local_part(name, parameter.detach())


def shard(
    model: M,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
    prepare: Callable[[nn.Module], None] | None = None,
) -> M:
    """Shard every decoder layer of `model.lm`, then the rest, in place; return it in training mode.

    `prepare` gets each layer before it is sharded.

    With `compute_dtype` bfloat16 passes run in bfloat16, and gradients are reduced in float32.

    Raises:
        ConfigError: the model's decoder layers cannot be found.
    """
    lm = cast(Any, model.lm)
    layers = _decoder_layers(lm)
    if gradient_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    precision = MixedPrecisionPolicy()
    if compute_dtype != torch.float32:
        precision = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    for layer in layers:
        if prepare is not None:
            prepare(layer)
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    return model.train()


def _decoder_layers(lm: nn.Module) -> list[nn.Module]:
    names = set(cast(Any, lm)._no_split_modules or ())
    layers = [m for m in lm.modules() if type(m).__name__ in names]
    if not layers:
        raise ConfigError(
            f"{type(lm).__name__} names no decoder layers to shard by (_no_split_modules = "
            f"{sorted(names)}). Use another model"
        )
    return layers


def _local_part(name: str, tensor: Tensor) -> LocalPart:
    shape = tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        raise ConfigError(f"parameter {name} is not sharded; shard the model first")
    _, offsets = compute_local_shape_and_global_offset(
        tensor.shape, tensor.device_mesh, tensor.placements
    )
    # shards are ranges of complete rows, so they are contiguous in the flattened tensor
    offset = offsets[0] * math.prod(shape[1:]) if shape else 0
    return LocalPart(name=name, shape=shape, offset=offset, tensor=tensor.to_local().reshape(-1))
