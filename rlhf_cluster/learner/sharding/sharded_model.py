"""Interface of a sharded model for the learner, whatever library shards it.

A `ShardedModel` is one rank's share of a model with its gradients and its AdamW. FSDP2
(`fsdp2.Fsdp2Model`) and DeepSpeed ZeRO-3 (`zero3.Zero3Model`) implement it. Promises of both:

- `backward` may be called any number of times before `step`, the same number on every rank. Gradients
  are the sum over all calls, each averaged over the ranks, and divided by nothing else;
- master weights, gradients between passes, and moments are float32, also if passes compute in
  bfloat16. Gradients are reduced over the ranks in float32;
- `gradients` and `shards` read this rank's memory only. `step` changes weights and moments only by
  AdamW, with decoupled weight decay on matrices only.

FSDP and ZeRO both AVERAGE gradients over the ranks. A loss that is a sum over tokens is therefore
multiplied by the number of ranks before `backward`, which makes the average a sum.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.weights.manifest import LocalPart

PARAMETER_GROUPS = ("embeddings", "attention", "mlp", "norms", "head", "other")
"""Parameter groups with separate gradient norms."""


class ShardedModel(Protocol):
    """One rank's share of a model, its gradients and its optimizer."""

    @property
    def module(self) -> nn.Module:
        """Module with sharded parameters. Forward passes use `__call__` of this object instead."""
        ...

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW whose state holds this rank's moments."""
        ...

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run a forward pass. Every rank must take part."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add this rank's share to the gradients. Every rank must take part."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameter names with this rank's part of the gradient, to be read or scaled in place.

        The parts of all ranks together hold every element of a gradient once.
        """
        ...

    def step(self, learning_rate: float) -> None:
        """Run one AdamW step with the current gradients, and clear them."""
        ...

    def clear_gradients(self) -> None:
        """Forget the gradients without a step."""
        ...

    def reset_optimizer(self) -> None:
        """Forget the moments and the count of steps."""
        ...

    def shards(self) -> Iterator[LocalPart]:
        """Yield this rank's part of every parameter, by its name in `module`, as flat views.

        Parts are float32 master weights, or the bytes of quantised weights. A part may be empty. Tied
        parameters appear once.
        """
        ...

    def whole(self, name: str) -> Tensor:
        """Gather the float32 master weight of a trained parameter. Every rank must take part."""
        ...

    def assign(self, parts: Iterable[LocalPart]) -> None:
        """Overwrite this rank's parts of trained parameters, by their names in `module`.

        The new parts have the same extent. Gradients and moments do not change.
        """
        ...

    def moments(self) -> Iterator[tuple[str, LocalPart]]:
        """Yield (key, this rank's part) of AdamW's state of every trained parameter, with its name.

        `exp_avg` and `exp_avg_sq` are sharded like the parameter; `step` [1] is complete on every
        rank. Parts are views into live memory, to be read or overwritten in place. They are zero before
        the first step.
        """
        ...

    def close(self) -> None:
        """Release everything that the library holds in addition to the module."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdamWSettings:
    """Settings of AdamW. Weight decay is for matrices only; each step gets its learning rate."""

    beta1: float
    beta2: float
    eps: float
    weight_decay: float


def adamw(module: nn.Module, settings: AdamWSettings, foreach: bool) -> torch.optim.AdamW:
    """Build AdamW over the trainable parameters, with weight decay on matrices only."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=0.0,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        foreach=foreach,
    )


STEP = "step"
MOMENTS = ("exp_avg", "exp_avg_sq")


def adamw_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return AdamW's state of a parameter. A missing one is created as by AdamW's first step."""
    state = optimizer.state[parameter]
    if not state:
        state[STEP] = torch.zeros((), dtype=torch.float32)
        state |= {key: torch.zeros_like(parameter) for key in MOMENTS}
    return state


def assert_float32(model: ShardedModel) -> None:
    """Raise `ConfigError` if a master weight or a moment is not float32.

    In bfloat16 an update smaller than 1/256 of a weight has no effect at all.
    """
    for part in model.shards():
        if part.tensor.is_floating_point() and part.tensor.dtype != torch.float32:
            raise ConfigError(f"master weight {part.name} is {part.tensor.dtype}, must be float32")
    for state in model.optimizer.state.values():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.dtype != torch.float32:
                raise ConfigError(f"optimizer state {key} is {value.dtype}, must be float32")


def clip_gradients(
    gradients: Iterable[tuple[str, Tensor]], max_norm: float
) -> tuple[float, dict[str, float]]:
    """Scale gradients in place so that their norm over all ranks is at most `max_norm`.

    If the norm is not finite the gradients do not change, and the caller must not step.

    Returns:
        The norm before clipping, and the norms of the parameter groups that have gradients, whose
        squares add up to the square of the norm. Both are the same on every rank.
    Waits for: all ranks (one collective).
    """
    by_group: dict[str, list[Tensor]] = {name: [] for name in PARAMETER_GROUPS}
    for name, gradient in gradients:
        by_group[parameter_group(name)].append(gradient)
    present = {name: parts for name, parts in by_group.items() if parts}
    if not present:
        return 0.0, {}
    norms = torch.stack([torch.nn.utils.get_total_norm(parts) for parts in present.values()])
    squares = norms.double() ** 2
    dist.all_reduce(squares)
    total = squares.sum().sqrt().item()
    if math.isfinite(total) and total > max_norm:
        for part in (part for parts in present.values() for part in parts):
            part.mul_(max_norm / (total + 1e-6))
    return total, dict(zip(present, squares.sqrt().tolist(), strict=True))


_PATTERNS = (
    ("norms", re.compile(r"(^|\.)(\w*norm\w*|ln_\w+)\.\w+$")),
    ("embeddings", re.compile(r"(^|\.)(embed\w*|wte|wpe|word_embeddings)\.")),
    ("attention", re.compile(r"(^|\.)\w*(attn|attention)\w*\.")),
    ("mlp", re.compile(r"(^|\.)\w*(mlp|feed_forward|ffn|experts?)\w*\.")),
    ("head", re.compile(r"(^|\.)(lm_head|score|value_head|output)\.")),
)


def parameter_group(name: str) -> str:
    """Return the group of a parameter by its name.

    A head that is tied to the embeddings belongs to the embeddings, an adapter to the group of its
    weight.
    """
    return next((group for group, pattern in _PATTERNS if pattern.search(name)), "other")
