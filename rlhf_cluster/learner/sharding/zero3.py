"""Sharding with DeepSpeed ZeRO-3, behind `sharded_model.ShardedModel`. Imports deepspeed when used.

Every flattened parameter is split into equal ranges, one per rank, the last ones padded. Each rank
keeps the float32 master copy of its ranges, in one flat tensor per optimizer group. With bfloat16
passes there is a second copy in bfloat16, made from the first.

This module prevents several defaults of DeepSpeed:
- dividing by the number of gradient accumulation steps (the engine is configured with one; `backward`
  sets `scale_wrt_gas=False`), clipping, setting learning rates, skipping steps for norms that are not
  finite;
- rounding the first weights: DeepSpeed makes float32 masters from the bfloat16 copy, so the masters are
  set again from the loaded weights;
- reducing or accumulating gradients in bfloat16;
- waiting for other ranks without a deadline: DeepSpeed's process group gets the learner's deadline;
- compiling an extension at the start (the one that it would use on CPU serves inference only).

After a rank died the group is rebuilt from new processes. DeepSpeed keeps counters in each process,
which would differ between old and new ranks.
"""

from __future__ import annotations

import datetime
import importlib.util
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_cluster.errors import ConfigError, RunError
from rlhf_cluster.learner.sharding.sharded_model import (
    MOMENTS,
    STEP,
    AdamWSettings,
    adamw,
    adamw_state,
)
from rlhf_cluster.weights.manifest import LocalPart

_MAX_BUCKET_ELEMENTS = 50_000_000


class Zero3Model:
    """`sharded_model.ShardedModel` of a module that a DeepSpeed engine partitions, with AdamW."""

    def __init__(self, engine: Any, frozen: dict[str, Tensor] | None = None) -> None:
        """`frozen`: this rank's flat parts of the parameters that have no master weights."""
        self._engine = engine
        self._frozen = frozen or {}
        self._rank = dist.get_rank()
        self._has_gradients = False

    @property
    def module(self) -> nn.Module:
        return self._engine.module

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self._engine.optimizer.optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        self._has_gradients = True

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        from deepspeed.utils import safe_get_local_grad

        for name, parameter in self.module.named_parameters():
            if self._has_gradients and parameter.requires_grad:
                _, count = self._extent(parameter)
                yield name, safe_get_local_grad(parameter).view(-1)[:count]

    def step(self, learning_rate: float) -> None:
        zero = self._engine.optimizer
        for group in zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        if zero.overflow:
            raise RunError(
                "DeepSpeed left out an optimizer step whose gradients have a finite norm; its ranks "
                "disagree. Use learner.backend = 'fsdp2'"
            )
        self._has_gradients = False

    def clear_gradients(self) -> None:
        self._engine.optimizer.zero_grad()
        self._has_gradients = False

    def reset_optimizer(self) -> None:
        self.optimizer.state.clear()

    def shards(self) -> Iterator[LocalPart]:
        from deepspeed.utils import safe_get_local_fp32_param

        parameters: Iterator[tuple[str, Any]] = self.module.named_parameters()
        for name, parameter in parameters:
            offset, count = self._extent(parameter)
            own: Any = self._frozen.get(name, parameter.ds_tensor)
            if parameter.requires_grad:
                own = safe_get_local_fp32_param(parameter)
            shape, flat = tuple(parameter.ds_shape), own.detach().view(-1)[:count]
            yield LocalPart(name=name, shape=shape, offset=offset, tensor=flat)

    def whole(self, name: str) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        whole: Any = safe_get_full_fp32_param(self.module.get_parameter(name))
        return whole

    def assign(self, parts: Iterable[LocalPart]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param

        for part in parts:
            parameter: Any = self.module.get_parameter(part.name)
            own = torch.zeros_like(parameter.ds_tensor, dtype=torch.float32)
            own[: part.tensor.numel()] = part.tensor
            safe_set_local_fp32_param(parameter, own)
            parameter.ds_tensor.copy_(own)  # DeepSpeed sets masters only

    def moments(self) -> Iterator[tuple[str, LocalPart]]:
        zero = self._engine.optimizer
        parameters: Iterator[tuple[str, Any]] = self.module.named_parameters()
        for name, parameter in parameters:
            if parameter.requires_grad:
                group, start, _ = zero.grad_position[zero.get_param_id(parameter)]
                state = adamw_state(self.optimizer, zero.fp32_partitioned_groups_flat[group])
                offset, count = self._extent(parameter)
                part = LocalPart(
                    name=name, shape=tuple(parameter.ds_shape), offset=offset, tensor=state[STEP]
                )
                for key in MOMENTS:
                    yield key, replace(part, tensor=state[key].narrow(0, start, count))
                yield STEP, replace(part, shape=(1,), offset=0, tensor=state[STEP].view(1))

    def close(self) -> None:
        self._engine.destroy()

    def _extent(self, parameter: Any) -> tuple[int, int]:
        """Return begin and length, without padding, of this rank's part of a flattened parameter."""
        offset = min(self._rank * parameter.ds_tensor.numel(), parameter.ds_numel)
        return offset, min(parameter.ds_tensor.numel(), parameter.ds_numel - offset)


def partition(
    module: nn.Module,
    settings: AdamWSettings,
    device: torch.device,
    compute_dtype: torch.dtype,
    collective_timeout_s: float,
) -> Zero3Model:
    """Partition a float32 module over all ranks of the default process group, in training mode.

    Raises:
        ConfigError: deepspeed is not installed.
    """
    deepspeed = import_deepspeed(device)
    loaded = {name: parameter.data for name, parameter in module.named_parameters()}
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=adamw(module, settings, foreach=False),
        config=_engine_config(module, device, compute_dtype),
        dist_init_required=False,
    )
    model = Zero3Model(engine)
    if compute_dtype != torch.float32:
        model = _with_loaded_weights(engine, loaded)
    timeout = datetime.timedelta(seconds=collective_timeout_s)
    dist.distributed_c10d._set_pg_timeout(timeout, engine.optimizer.dp_process_group)
    engine.train()
    return model


def leave_group() -> None:
    """Leave the process group and DeepSpeed's derived groups. Call it when all models are closed."""
    from deepspeed import comm

    comm.destroy_process_group()


def import_deepspeed(device: torch.device) -> Any:
    """Import deepspeed for a rank with `device`. Raises `ConfigError` if it is not installed."""
    if importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            "learner.backend = 'zero3' needs deepspeed, which is not installed. Install it "
            "(DS_BUILD_OPS=0 pip install deepspeed), or use learner.backend = 'fsdp2'"
        )
    os.environ["DS_ACCELERATOR"] = device.type
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _engine_config(
    module: nn.Module, device: torch.device, compute_dtype: torch.dtype
) -> dict[str, Any]:
    sizes = [parameter.numel() for parameter in module.parameters()]
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 0.0,
        "steps_per_print": 2**40,
        "zero_allow_untested_optimizer": True,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": compute_dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "overlap_comm": device.type == "cuda",
            "contiguous_gradients": True,
            "reduce_bucket_size": max(max(sizes), min(sum(sizes), _MAX_BUCKET_ELEMENTS)),
            "stage3_param_persistence_threshold": 0,
        },
    }


def _with_loaded_weights(engine: Any, loaded: dict[str, Tensor]) -> Zero3Model:
    """Set master and frozen weights to this rank's part of the loaded weights, without rounding."""
    trained, frozen = [], {}
    for part in Zero3Model(engine).shards():
        own = loaded[part.name].view(-1)[part.offset : part.offset + part.tensor.numel()]
        if engine.module.get_parameter(part.name).requires_grad:
            trained.append(replace(part, tensor=own))
        elif own.dtype != part.tensor.dtype:
            frozen[part.name] = own.clone()
    model = Zero3Model(engine, frozen)
    model.assign(trained)
    return model
