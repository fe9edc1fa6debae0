"""INT8 rounding of weights, for generation and frozen models. Importing it loads no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


_LARGEST = 127


def round_to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round `weight` [out, in] to INT8. Returns codes int8 [out, in] and scales float32 [out, 1]."""
    import torch

    weight = weight.float()
    # a row of zeros still needs a scale that is not zero
    scale = weight.abs().amax(dim=1, keepdim=True).div(_LARGEST).clamp_min(1e-12)
    return weight.div(scale).round_().to(torch.int8), scale
