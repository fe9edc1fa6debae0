"""Frozen linear layers in 4 bits: QLoRA's NF4 (arXiv 2305.14314), by bitsandbytes, imported when used.

    W = level[code] * scale        a code has 4 bits, two codes are in one byte; 64 codes share a scale
                                   of 8 bits, which is scaled again

Promises:
- the policy has these W: passes, published versions and the reference use the values that the bytes
  encode, never the weights that were rounded;
- a product has the type of its input, to which W is rounded, with and without gradients. W itself
  exists for one product at a time, forward and backward;
- the bytes are a parameter, which backends shard like any other. The scales, 0.13 bits per weight, are
  complete on every rank. A rank reads its share of W without the others.

The layer of bitsandbytes is not used: on a CPU, passes without gradients repack its bytes in place and
compute in bfloat16.
"""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.models.policy_model import PolicyLM
from rlhf_cluster.weights.manifest import LocalPart

_BLOCK = 64
_TYPE = "nf4"
_PACKED = ".packed"


class Linear4bit(nn.Linear):
    """Frozen linear layer that replaces another one and holds its weights rounded to 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # that of nn.Linear would make a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        packed, self._state = _bitsandbytes().quantize_4bit(
            linear.weight.detach(), blocksize=_BLOCK, compress_statistics=True, quant_type=_TYPE
        )
        self.packed = nn.Parameter(packed, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Dequantised copy of W, [out, in] float32."""
        return self.unpack(self.packed)

    def unpack(self, packed: Tensor) -> Tensor:
        """Dequantise W, [out, in] float32, from all its bytes [out * in / 2, 1] uint8."""
        return self.unpack_run(packed.view(-1), 0).view(self.out_features, self.in_features)

    def unpack_run(self, packed: Tensor, offset: int) -> Tensor:
        """Dequantise a part of flattened W, float32, from bytes that begin at byte `offset`."""
        functional, bytes_per_block = _bitsandbytes(), _BLOCK // 2
        stop = offset + packed.numel()
        first, last = offset // bytes_per_block, -(-stop // bytes_per_block)
        lead = offset - first * bytes_per_block
        blocks = nn.functional.pad(packed, (lead, last * bytes_per_block - stop))
        scales = functional.dequantize_blockwise(self._state.absmax, self._state.state2)
        # one block per row: for rows shorter than a block the CPU kernel uses scales of other blocks
        state = functional.QuantState(
            absmax=(scales + self._state.offset)[first:last],
            shape=torch.Size((last - first, _BLOCK)),
            blocksize=_BLOCK,
            quant_type=_TYPE,
            dtype=self._state.dtype,
        )
        weight = functional.dequantize_4bit(blocks.view(-1, 1), state).view(-1)
        return weight[2 * lead : 2 * (lead + packed.numel())]

    def forward(self, input: Tensor) -> Tensor:
        return _Product.apply(input, self.packed, self.bias, self)


class _Product(torch.autograd.Function):
    """Product x W^T + bias that keeps the bytes of W for the backward pass. The bias is frozen."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, packed: Tensor, bias: Tensor | None, layer: Linear4bit
    ) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.layer = layer
        weight = layer.unpack(packed).to(input.dtype)
        return nn.functional.linear(input, weight, None if bias is None else bias.to(input.dtype))

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        (packed,), [gradient] = ctx.saved_tensors, grad_outputs
        return gradient @ ctx.layer.unpack(packed).to(gradient.dtype), None, None, None


def quantize_decoder(policy: PolicyLM) -> None:
    """Replace every plain linear layer of the decoder in place, but not the output projection.

    An outline without weights stays as it is.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "learner.lora.quantize_base = true needs bitsandbytes, which is not installed. Install it "
            "(pip install bitsandbytes), or set learner.lora.quantize_base = false"
        )
    if not next(policy.parameters()).is_meta:
        quantize_linears(policy.lm.base_model)


def quantize_linears(module: nn.Module) -> None:
    """Replace every plain linear layer below `module` in place, one after the other."""
    for name, layer in list(module.named_modules()):
        if type(layer) is nn.Linear:
            module.set_submodule(name, Linear4bit(layer))


def stands_for(module: nn.Module, part: LocalPart) -> tuple[str, tuple[int, ...]]:
    """Return name and shape of the weight that the part's tensor holds, packed or not."""
    if not part.name.endswith(_PACKED):
        return part.name, part.shape
    prefix = part.name.removesuffix(_PACKED)
    layer: Any = module.get_submodule(prefix)
    return f"{prefix}.weight", (layer.out_features, layer.in_features)


def unpacked(model: ShardedModel, part: LocalPart) -> LocalPart:
    """Dequantise a part that holds bytes of W to this rank's part of W; return others unchanged."""
    if not part.name.endswith(_PACKED):
        return part
    layer: Any = model.module.get_submodule(part.name.removesuffix(_PACKED))
    name, shape = stands_for(model.module, part)
    weight = layer.unpack_run(part.tensor, part.offset)
    return replace(part, name=name, shape=shape, offset=2 * part.offset, tensor=weight)


def _bitsandbytes() -> Any:
    import bitsandbytes.functional as functional  # pyright: ignore[reportMissingImports]

    return functional
