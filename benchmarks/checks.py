"""What two sides of a benchmark must agree on before either one's speed is reported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RELATIVE_BOUND = {"bfloat16": 2e-2, "float32": 1e-4}
"""Largest distance of two tensors over the largest entry of the expected one."""


def check_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], bound: float) -> None:
    """Ends the benchmark unless every tensor agrees, relative to its largest entry."""
    if found.keys() != expected.keys():
        raise SystemExit(f"gradients of different parameters: {found.keys() ^ expected.keys()}")
    for name, value in expected.items():
        distance = (found[name].float() - value.float()).abs().max().item()
        largest = value.float().abs().max().item()
        if not distance <= bound * largest:
            raise SystemExit(
                f"{name}: the sides are {distance:.3g} apart, its largest entry is {largest:.3g}; "
                "no speed to report"
            )
