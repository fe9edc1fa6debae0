"""Sections of preference losses, and pairs of log-probabilities to give them."""

from typing import Any

import torch
from pydantic import TypeAdapter

from rlhf_cluster.algorithms.preference_loss_config import (
    PREFERENCE_LOSSES,
    PreferenceLoss,
)
from rlhf_cluster.algorithms.preference_losses import Pairs

F64 = torch.float64
SECTION: TypeAdapter[Any] = TypeAdapter(PreferenceLoss)
PAIRED = [name for name, section in PREFERENCE_LOSSES.items() if section.paired]


def section(type: str, **keys: Any) -> Any:
    return SECTION.validate_python({"type": type, **keys})


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def random_pairs(seed: int = 0, num: int = 32, dtype: torch.dtype = F64) -> Pairs:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (2, num), generator=draw)
    ref = -2.0 * lengths * (0.5 + torch.rand(2, num, generator=draw, dtype=F64))
    # both responses drift from the reference, some up and some down, never over probability 1
    policy = (ref + 2 * torch.randn(2, num, generator=draw, dtype=F64)).clamp(max=-0.05).to(dtype)
    return Pairs(
        chosen=policy[0].clone().requires_grad_(),
        rejected=policy[1].clone().requires_grad_(),
        chosen_tokens=lengths[0],
        rejected_tokens=lengths[1],
        ref_chosen=ref[0].to(dtype),
        ref_rejected=ref[1].to(dtype),
    )
