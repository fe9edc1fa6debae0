"""Frozen linear layers in 4 bits: QLoRA's NF4 (arXiv 2305.14314), by bitsandbytes, imported when used.

    W = level[code] * scale        a code is 4 bits, two a byte; a scale is shared by 64 of them, in 8
                                   bits that are scaled once more

Promises:
- the policy is the one of these W: passes, published versions and the reference are of what the bytes
  stand for, never of the weights that they were made from;
- a product is in the type of its input, W rounded to it, with gradients and without alike; W itself
  exists for one product at a time, forward and backward;
- the bytes are a parameter, which backends shard like any other; the scales, 0.13 bits a weight, are
  whole on every rank. A rank reads its own share of W without the others.

bitsandbytes' own layer is not used: on a CPU, passes without gradients repack its bytes in place and
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
    """A frozen linear layer that stands for another one, whose weights it rounds to 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # nn.Linear's own makes a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_parameter("bias", linear.bias)
        packed, self._state = _bitsandbytes().quantize_4bit(
            linear.weight.detach(), blocksize=_BLOCK, compress_statistics=True, quant_type=_TYPE
        )
        self.packed = nn.Parameter(packed, requires_grad=False)

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """A copy of W, [out, in] float32."""
        return self.unpack(self.packed)

    def unpack(self, packed: Tensor) -> Tensor:
        """W, [out, in] float32, of all its bytes [out * in / 2, 1] uint8."""
        return self.unpack_run(packed.view(-1), 0).view(self.out_features, self.in_features)

    def unpack_run(self, packed: Tensor, offset: int) -> Tensor:
        """The part of flattened W, float32, of a run of its bytes that begins at byte `offset`."""
        functional, bytes_per_block = _bitsandbytes(), _BLOCK // 2
        stop = offset + packed.numel()
        first, last = offset // bytes_per_block, -(-stop // bytes_per_block)
        lead = offset - first * bytes_per_block
        blocks = nn.functional.pad(packed, (lead, last * bytes_per_block - stop))
        scales = functional.dequantize_blockwise(self._state.absmax, self._state.state2)
        # one block a row: for rows shorter than a block the CPU kernel takes scales of others
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
    """x W^T + bias, keeping the bytes of W for the backward pass instead of W. The bias is frozen."""

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
    """Replace every plain linear layer of the decoder in place; the output projection stays.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "learner.lora.quantize_base = true needs bitsandbytes, which is not installed. Install it "
            "(pip install bitsandbytes), or set learner.lora.quantize_base = false"
        )
    decoder = policy.lm.base_model
    for name, layer in list(decoder.named_modules()):
        if type(layer) is nn.Linear:
            decoder.set_submodule(name, Linear4bit(layer))


def stands_for(module: nn.Module, part: LocalPart) -> tuple[str, tuple[int, ...]]:
    """Name and shape of the weight that the part's tensor holds, in bytes or as it is."""
    if not part.name.endswith(_PACKED):
        return part.name, part.shape
    prefix = part.name.removesuffix(_PACKED)
    layer: Any = module.get_submodule(prefix)
    return f"{prefix}.weight", (layer.out_features, layer.in_features)


def unpacked(model: ShardedModel, part: LocalPart) -> LocalPart:
    """This rank's part of W for its part of W's bytes; any other part as it is."""
    if not part.name.endswith(_PACKED):
        return part
    layer: Any = model.module.get_submodule(part.name.removesuffix(_PACKED))
    name, shape = stands_for(model.module, part)
    weight = layer.unpack_run(part.tensor, part.offset)
    return replace(part, name=name, shape=shape, offset=2 * part.offset, tensor=weight)


def _bitsandbytes() -> Any:
    import bitsandbytes.functional as functional  # pyright: ignore[reportMissingImports]

    return functional
