"""Adapters on the policy's linear layers, by peft: LoRA (arXiv 2106.09685) and DoRA (2402.09353).

    LoRA   W' = W + s B A                                  s = alpha / rank, B [out, rank], A [rank, in]
    DoRA   W' = m (W + s B A) / |W + s B A|                the norm a row, m [out] learnt

Promises:
- only the adapters are trained; W stays what was loaded, to the bit, or what its rounding to 4 bits
  stands for (`learner.sharding.qlora`), in which case version 0 takes the place of the folder below;
- B starts at 0 and m at |W|, so the policy starts as the model it was loaded from, which is
  therefore the reference: a folder whose weights had an adapter merged into them before is the
  reference WITH that adapter. The first A depends on the seed only, not on the rank;
- the output projection and the embeddings are never adapted: log-probabilities are taken from their
  weights directly, past any adapter;
- no dropout: probabilities are a function of weights and tokens alone;
- what is published is W', in the names of the checkpoint, merged into a copy by
  `weights.formats.lora_factors.merge`; readers do the same where only the adapters are stored.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.sharding.qlora import (
    Linear4bit,
    quantize_decoder,
)
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.models.policy_model import PolicyLM
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.manifest import LocalPart

if TYPE_CHECKING:
    from rlhf_cluster.sections.rl_run import Lora

_ADAPTER = "default"
_BASE = ".base_layer.weight"


def add_adapters(policy: PolicyLM, settings: Lora, seed: int) -> None:
    """Put adapters on the layers that `settings.targets` names and freeze all else, in place.

    With `settings.quantize_base` every linear layer of the decoder is rounded to 4 bits before.

    Raises:
        ConfigError: no linear layer of that name, or one that must not be adapted; bitsandbytes is
            needed and not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        use_dora=settings.dora,
    )
    if settings.quantize_base:
        quantize_decoder(policy)
    device = next(policy.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(config, policy.lm, _ADAPTER)
        except ValueError as error:
            raise ConfigError(f"learner.lora.targets = {targets!r}: {error}") from error
    linear = {
        name.removesuffix(".base_layer")
        for name, layer in policy.named_modules()
        if name.endswith(".base_layer") and type(layer) in (nn.Linear, Linear4bit)
    }
    adapted = {name.partition(".lora_")[0] for name in adapter_names(policy)}
    if adapted - linear:
        raise ConfigError(
            f"learner.lora.targets = {targets!r} would adapt {sorted(adapted - linear)[:3]}, which "
            "is not a plain linear layer inside the decoder: log-probabilities are taken from the "
            "output projection's weights, past any adapter. Name linear layers, or use 'all-linear'"
        )


def adapter_names(policy: nn.Module) -> list[str]:
    """Names of the adapters' parameters."""
    return [name for name, _ in policy.named_parameters() if is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def is_adapted(name: str) -> bool:
    """Whether a parameter of this name is a weight under an adapter."""
    return name.endswith(_BASE)


def factor_name(name: str) -> str | None:
    """What an adapter's parameter is stored as, after the name of its weight; None for m, whose
    place the gain takes."""
    prefix, _, kind = name.partition(".lora_")
    stored = {
        f"A.{_ADAPTER}.weight": lora_factors.DOWN,
        f"B.{_ADAPTER}.weight": lora_factors.UP,
    }.get(kind)
    return None if stored is None else prefix + _BASE + stored


def merged(model: ShardedModel, part: LocalPart) -> list[LocalPart]:
    """This rank's part of W' for its part of a W, and for DoRA its part of the gain.

    W' is under the name of W, a copy: neither W nor the adapter changes; the gain is named as
    `weights.formats.lora_factors` says. The part may begin and end inside a row. Every rank must
    take part: the adapter is gathered, and for DoRA the norms of the rows are summed.
    """
    prefix = part.name.removesuffix(_BASE)
    layer: Any = model.module.get_submodule(prefix)
    scale = float(layer.scaling[_ADAPTER])
    down = model.whole(f"{prefix}.lora_A.{_ADAPTER}.weight")
    up = model.whole(f"{prefix}.lora_B.{_ADAPTER}.weight")
    columns, stop = part.shape[1], part.offset + part.tensor.numel()
    first, last = part.offset // columns, -(-stop // columns)
    weight = lora_factors.merge(part.tensor, part.offset, down, up[first:last], scale)
    found = [replace(part, tensor=weight, scale=scale)]
    if _ADAPTER in layer.lora_magnitude_vector:
        # what the part leaves of its first and its last row, at most
        around = (part.offset - first * columns, last * columns - stop)
        squares = weight.new_zeros(part.shape[0])
        rows = nn.functional.pad(weight, around).view(-1, columns)
        squares[first:last] = rows.square().sum(dim=1)
        dist.all_reduce(squares)
        magnitude = model.whole(f"{prefix}.lora_magnitude_vector.{_ADAPTER}.weight")
        gain = magnitude / squares.sqrt()
        lora_factors.scale_rows(weight, part.offset, columns, gain[first:last])
        begin = -(-part.offset // columns)  # a row is stored by the rank that has its first element
        shape, own = part.shape[:1], gain[begin:last]
        name = part.name + lora_factors.GAIN
        found.append(LocalPart(name=name, shape=shape, offset=begin, tensor=own))
    return found
