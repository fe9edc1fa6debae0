"""Factors of weights with an adapter: their names in a version, and how readers merge them.

    LoRA   W' = W + scale (B A)                  B [out, rank], A [rank, in]
    DoRA   W' = gain (W + scale (B A))           gain [out], one per row: m / |W + scale (B A)|

A version of format `adapter` stores these factors, named after the weight that they make up:

    name#base                [out, in]     W: written in an anchor, kept by the versions on it
    name#lora_A, #lora_B     float32       A and B
    name#gain                float32       DoRA only. The learner divides by the norms, readers do not

Promises:
- Learner and readers merge by `merge`, in float32, one elementwise operation after the other: the
  products of a column of B and a row of A are summed in the order of the adapter's rank. IEEE 754
  rounds each operation, so the result is bitwise identical on any device, and for any part of W. A
  matrix product is not: its order of summation depends on the library, the shape and the device.
- The merged weight is rounded to bfloat16 by a stream whose key the manifest holds
  (`stochastic_rounding`), or to nearest where it holds none.
- So a version has the hashes and the digest of the same weights stored as a full snapshot. The
  learner hashes the weights that it merged, and readers compare theirs. A machine that computes other
  values gets an error. (NaN has many bit patterns, so weights must be finite.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.errors import WeightError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

BASE = "#base"
DOWN = "#lora_A"
UP = "#lora_B"
GAIN = "#gain"
TRAINED = (DOWN, UP, GAIN)
"""Suffixes of the factors that every version stores."""
_BLOCK_ELEMENTS = 1 << 17  # small enough that the sum stays in the cache


def is_factor(name: str) -> bool:
    """Whether the name is that of a factor, and not of a tensor of the model."""
    return name.endswith((BASE, *TRAINED))


def factors_of(name: str, factors: Iterable[str]) -> list[str]:
    """Return the names among `factors` that make up tensor `name`, in their order."""
    own = {name + kind for kind in (BASE, *TRAINED)}
    return [factor for factor in factors if factor in own]


def check_factors(
    name: str, shape: tuple[int, ...], factors: Mapping[str, tuple[int, ...]]
) -> None:
    """Check that `factors`, shapes by name of all of a version, make up this weight.

    Raises `WeightError` where one is missing or has another shape, or the weight is not a matrix.
    """
    down = factors.get(name + DOWN, ())
    rank = down[0] if down else 0
    wanted = {name + BASE: shape, name + DOWN: (rank, *shape[1:]), name + UP: (*shape[:1], rank)}
    if name + GAIN in factors:
        wanted[name + GAIN] = shape[:1]
    problems = [
        f"{factor} has shape {list(factors[factor])}, expected {list(expected)}"
        if factor in factors
        else f"{factor} is missing"
        for factor, expected in wanted.items()
        if factors.get(factor) != expected
    ]
    if problems or len(shape) != 2:
        raise WeightError(f"tensor {name!r} of shape {list(shape)}: {'; '.join(problems)}")


def merge(
    base: Tensor, offset: int, down: Tensor, up: Tensor, scale: float, gain: Tensor | None = None
) -> Tensor:
    """Return elements [offset, offset + numel) of the flattened W', float32 [numel].

    `base`: the same elements of W, flat. `down`: the complete A [rank, in]. `up` [rows, rank] and
    `gain` [rows]: B and the gains for the rows that hold one of these elements, both float32. The
    result is on the device of the arguments.
    """
    import torch

    merged = base.to(torch.float32, copy=True)
    columns = down.shape[1]
    num_rows = max(1, _BLOCK_ELEMENTS // columns)
    for row in range(0, up.shape[0] if merged.numel() else 0, num_rows):
        update = _product(up[row : row + num_rows], down).mul_(scale).view(-1)
        start = row * columns - offset % columns
        skipped = max(0, -start)
        target = merged[start + skipped : start + update.numel()]
        target.add_(update[skipped : skipped + target.numel()])
    if gain is not None:
        scale_rows(merged, offset, columns, gain)
    return merged


def scale_rows(weight: Tensor, offset: int, columns: int, gain: Tensor) -> None:
    """Multiply each row by its gain, in place: the last operation of `merge`.

    `weight`: elements from `offset` on, flat. `gain`: one value per row that holds one of them.
    """
    head = min(-offset % columns, weight.numel())
    whole = (weight.numel() - head) // columns
    first = 1 if head else 0
    body, tail = weight[head : head + whole * columns], weight[head + whole * columns :]
    weight[:head].mul_(gain[:1])
    body.view(whole, columns).mul_(gain[first : first + whole, None])
    if tail.numel():
        tail.mul_(gain[-1:])


def _product(up: Tensor, down: Tensor) -> Tensor:
    import torch

    total = up[:, :1] * down[0]
    term = torch.empty_like(total)
    for k in range(1, down.shape[0]):
        # Two operations on purpose: a fused one is rounded once on some devices, twice on others.
        torch.mul(up[:, k : k + 1], down[k], out=term)
        total.add_(term)
    return total
