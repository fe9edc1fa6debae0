"""INT8 layers of frozen models against compressed-tensors' own rounding, which comes with vLLM."""

from __future__ import annotations

import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize

from rlhf_cluster.models.int8_linear import Linear8bit


def test_codes_and_weights_are_those_of_compressed_tensors_to_the_bit() -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(40, 6)
    layer = Linear8bit(linear)
    settings = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    scale, zero = layer.scale[:, None], torch.zeros(6, 1, dtype=torch.int8)
    codes = quantize(linear.weight.detach(), scale, zero, settings, dtype=torch.int8)
    assert torch.equal(layer.codes, codes)
    assert torch.equal(layer.weight, dequantize(codes, scale, zero, settings))
