"""How weights are rounded to INT8, for generation and for frozen models alike. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


_LARGEST = 127


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [out, in] as INT8 [out, in] and its scales [out, 1], float32."""
    import torch

    weight = weight.float()
    # A row of zeros keeps a scale that can be divided by.
    scale = weight.abs().amax(dim=1, keepdim=True).div(_LARGEST).clamp_min(1e-12)
    return weight.div(scale).round_().to(torch.int8), scale
