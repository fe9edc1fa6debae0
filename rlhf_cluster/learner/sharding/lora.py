"""Adapters on the policy's linear layers, by peft: LoRA (arXiv 2106.09685) and DoRA (2402.09353).

    LoRA   W' = W + s B A                                  s = alpha / rank, B [out, rank], A [rank, in]
    DoRA   W' = m (W + s B A) / |W + s B A|                one norm per row, m [out] learnt

Promises:
- only the adapters are trained. W is bitwise identical to the loaded weight. With 4 bits
  (`learner.sharding.qlora`) W is the rounded weight, and the next promise holds for version 0 instead
  of the folder;
- B starts at 0 and m at |W|, so the policy starts equal to the model of the folder, which is therefore
  the reference. If an adapter was merged into the folder's weights before, the reference has that
  adapter too. The first A depends on the seed only, not on the rank;
- the output projection and the embeddings are never adapted, because log-probabilities are computed
  from their weights directly, without any adapter;
- there is no dropout: probabilities depend on weights and tokens only;
- W' is published, with the names of the checkpoint, merged into a copy by
  `weights.formats.lora_factors.merge`. If only the adapters are stored, readers merge in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import nn

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.sharding.qlora import (
    Linear4bit,
    quantize_decoder,
    quantize_linears,
)
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.models.model_folder import checkpoint_files, materialize
from rlhf_cluster.models.policy_model import PolicyLM, checkpoint_name
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.manifest import LocalPart

if TYPE_CHECKING:
    from rlhf_cluster.sections.training import Lora

_ADAPTER = "default"
_BASE = ".base_layer.weight"


def add_adapters(policy: PolicyLM, settings: Lora, seed: int) -> None:
    """Add adapters to the layers of `settings.targets` and freeze all other weights, in place.

    With `settings.quantize_base` every linear layer of the decoder is rounded to 4 bits first.

    Raises:
        ConfigError: there is no linear layer of that name, it must not be adapted, or bitsandbytes is
            needed and not installed.
    """
    from peft import inject_adapter_in_model

    targets = settings.targets if isinstance(settings.targets, str) else list(settings.targets)
    if settings.quantize_base:
        quantize_decoder(policy)
    device = next(policy.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(_peft_config(settings, targets), policy.lm, _ADAPTER)
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


@contextmanager
def adapting(
    policy: PolicyLM, settings: Lora, seed: int, device: torch.device, model_dir: str | Path
) -> Iterator[Callable[[nn.Module], None]]:
    """Give a function that reads one decoder layer of an outlined policy, and adds its adapters.

    Called on the layers in their order it makes what `add_adapters` makes of the loaded model, with the
    weights of one layer in float32 at a time. All other weights are frozen. `add_adapters` on another
    outline of the model refuses what cannot be adapted.
    """
    from peft import inject_adapter_in_model

    policy.requires_grad_(False)
    names = {id(module): name for name, module in policy.named_modules()}
    files = checkpoint_files(model_dir)  # once: a large model has many layers and many files
    suffixes = None if settings.targets == "all-linear" else tuple(settings.targets)

    def adapt(layer: nn.Module) -> None:
        prefix = names[id(layer)]
        materialize(layer, files, device, lambda n: checkpoint_name(f"{prefix}.{n}"))
        targets = [
            name
            for name, module in layer.named_modules()
            if type(module) is nn.Linear
            and (suffixes is None or f"{prefix}.{name}".endswith(tuple(f".{s}" for s in suffixes)))
        ]
        if settings.quantize_base:
            quantize_linears(layer)
        if targets:
            inject_adapter_in_model(_peft_config(settings, targets), layer, _ADAPTER)

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield adapt


def _peft_config(settings: Lora, targets: list[str] | str) -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=settings.rank,
        lora_alpha=cast(int, settings.alpha),
        target_modules=targets,
        lora_dropout=0.0,
        bias="none",
        use_dora=settings.dora,
    )


def adapter_names(policy: nn.Module) -> list[str]:
    """Return the names of the adapters' parameters."""
    return [name for name, _ in policy.named_parameters() if is_adapter(name)]


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return ".lora_" in name


def is_adapted(name: str) -> bool:
    """Whether a parameter of this name is a weight under an adapter."""
    return name.endswith(_BASE)


def factor_name(name: str) -> str | None:
    """Return the stored name of an adapter's parameter, which begins with its weight's name.

    None for m, instead of which the gain is stored.
    """
    prefix, _, kind = name.partition(".lora_")
    stored = {
        f"A.{_ADAPTER}.weight": lora_factors.DOWN,
        f"B.{_ADAPTER}.weight": lora_factors.UP,
    }.get(kind)
    return None if stored is None else prefix + _BASE + stored


def merged(model: ShardedModel, part: LocalPart) -> list[LocalPart]:
    """Merge adapters into this rank's part of a W. Returns its part of W', for DoRA also of the gain.

    W' is a copy with the name of W: neither W nor the adapter changes. The gain has the name that
    `weights.formats.lora_factors` defines. The part may begin and end inside a row. Every rank must
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
        # elements that the part lacks of its first and of its last row
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
