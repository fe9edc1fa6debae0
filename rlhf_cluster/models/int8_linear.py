"""Frozen linear layers in 8 bits: weights only, one scale per output channel.

    W[o, i] = code[o, i] * scale[o]        code int8, scale = max |row| / 127, float32

The rounding is that of the generation pool (`weights.formats.int8`), in compressed-tensors' format.

Promises:
- a product has the type of its input;
- the codes are exact in bfloat16 as in float32, so W is not rounded a second time: the scale is applied
  to the product, in float32;
- embeddings, norms, the output projection and a score head are unchanged;
- no gradient reaches W.

Memory: 1 byte per weight and 4 bytes per row. W's codes in the type of the input exist for one product
at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlhf_cluster.errors import ConfigError

_LARGEST = 127


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to INT8. Returns codes int8 [out, in] and scales float32 [out, 1]."""
    weight = weight.float()
    # a row of zeros still needs a scale that is not zero
    scale = weight.abs().amax(dim=1, keepdim=True).div(_LARGEST).clamp_min(1e-12)
    return weight.div(scale).round_().to(torch.int8), scale


class Linear8bit(nn.Module):
    """Frozen linear layer that replaces another one and holds its weights rounded to 8 bits."""

    codes: Tensor
    scale: Tensor
    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale = round_to_int8(linear.weight.detach())
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale.squeeze(1))
        self.register_parameter("bias", linear.bias)

    @property
    def weight(self) -> Tensor:
        """Dequantised copy of W, [out, in] float32."""
        return self.codes * self.scale[:, None]

    def replace(self, weight: Tensor) -> None:
        """Round `weight` [out, in], on any device, and replace codes and scales by it."""
        codes, scale = round_to_int8(weight.detach().to(self.codes.device))
        self.codes.copy_(codes)
        self.scale.copy_(scale.squeeze(1))

    def forward(self, input: Tensor) -> Tensor:
        product = nn.functional.linear(input, self.codes.to(input.dtype)) * self.scale
        if self.bias is not None:
            product = product + self.bias
        return product.to(input.dtype)


def quantize_linear(decoder: nn.Module, what: str) -> None:
    """Replace every plain linear layer below `decoder`, in place. `what` names the model in errors.

    Raises:
        ConfigError: it has fused experts, which are not linear layers and hold most of the weights,
            or no linear layer at all.
    """
    fused = next((name for name, p in decoder.named_parameters() if p.ndim > 2), None)
    plain = [(name, layer) for name, layer in decoder.named_modules() if type(layer) is nn.Linear]
    if fused is not None or not plain:
        reason = (
            "no plain linear layer" if fused is None else f"{fused} of more than two dimensions"
        )
        raise ConfigError(
            f"{what}: {type(decoder).__name__} has {reason}, and quantization = 'int8' rounds the "
            "linear layers of dense models. Remove quantization"
        )
    for name, layer in plain:
        decoder.set_submodule(name, Linear8bit(layer))
