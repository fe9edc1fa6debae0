"""Rounding from float32 to bfloat16 that keeps small updates in the mean.

    low = the 16 bits that bfloat16 drops                    draw uniform in [0, 65536)
    rounded away from zero where low + draw >= 65536, towards zero elsewhere

Rounding to nearest returns a weight on the bfloat16 grid that moves by less than half a unit to its
old value: an update of 1e-4 of the weights loses 94 % of itself. Here the weight moves a whole unit
with the probability low / 65536, which makes the mean over elements and versions exact.

Promises:
- The draws are a counter-based stream: the draw of element i is a function of the key and i alone.
  It is computed in integers, so the bits are the same on any device, for any split of a tensor into
  ranges, and each time.
- Values on the grid, zeros of both signs and infinities stay bitwise identical, and NaN stays NaN.
  Subnormal numbers round like all others. The next number above the largest finite one is infinity,
  as in rounding to nearest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from xxhash import xxh3_64_intdigest

if TYPE_CHECKING:
    from torch import Tensor

# splitmix64 (Steele, Lea, Flood 2014): the increment and the two factors of the finaliser, signed
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_FACTORS = (0xBF58476D1CE4E5B9 - (1 << 64), 0x94D049BB133111EB - (1 << 64))
_DRAWS = 4  # of 16 bits in one word of the stream
_BLOCK = 1 << 16  # elements, so that the words in between stay in the cache


def stream_key(version: int, name: str) -> int:
    """Return the key of the stream that rounds tensor `name` of a version, in [0, 2^63)."""
    return xxh3_64_intdigest(f"{version}:{name}".encode()) >> 1


def round_stochastically(values: Tensor, offset: int, key: int) -> Tensor:
    """Round elements [offset, offset + numel) of a flat float32 tensor to bfloat16, on their device.

    `values`: these elements, [numel]. `key`: as of `stream_key`.
    """
    import torch

    rounded = torch.empty_like(values, dtype=torch.bfloat16)
    for start in range(0, values.numel(), _BLOCK):
        block = values[start : start + _BLOCK]
        bits = block.view(torch.int32) + _draws(block, offset + start, key)
        upper = (bits >> 16).to(torch.int16).view(torch.bfloat16)
        torch.where(block.isnan(), block.to(torch.bfloat16), upper, out=rounded[start:][:_BLOCK])
    return rounded


def _draws(like: Tensor, offset: int, key: int) -> Tensor:
    """Return one draw per element of `like`, int32 in [0, 65536), for elements from `offset` on."""
    import torch

    first, skipped = divmod(offset, _DRAWS)
    last = -(-(offset + like.numel()) // _DRAWS)
    words = torch.arange(first + 1, last + 1, dtype=torch.int64, device=like.device)
    words = words.mul_(_STEP).add_(key)  # int64 wraps around
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        words.bitwise_xor_(_shift_right(words, shift)).mul_(factor)
    words.bitwise_xor_(_shift_right(words, 31))
    halves = words.view(torch.int16)[skipped : skipped + like.numel()]
    return halves.to(torch.int32).bitwise_and_(0xFFFF)


def _shift_right(words: Tensor, count: int) -> Tensor:
    """Shift the words right as unsigned numbers: torch's shift of int64 keeps the sign."""
    return (words >> count).bitwise_and_((1 << 64 - count) - 1)
