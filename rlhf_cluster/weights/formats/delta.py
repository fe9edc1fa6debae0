"""Bit-exact difference between two versions of a flat tensor, in few bytes.

Elements are compared and restored as unsigned integers of their size, so that NaN, infinities and
the sign of zero survive. A payload is a sequence of blocks, one for each `BLOCK_ELEMENTS` elements:

    block  = number of changed elements (u32), length of the frame (u32), frame
    frame  = zstd(gaps in bytes 0, gaps in bytes 1, .., values in bytes 0, values in bytes 1, ..)
    gap    = index of a changed element in its block - index of the one before - 1   (u32)
    value  = zigzag(new - base), the difference modulo 2 ** bits of the element

A small step in bfloat16 moves most changed elements to the next representable number. The value is
then 1 or 2, and gaps are short, so that a changed element costs about a byte. Memory in addition to
the two tensors: some `BLOCK_ELEMENTS` times 8 bytes, whatever the tensor's size.

A payload carries no hash. The caller that applies it verifies the hash of the whole tensor.
"""

from __future__ import annotations

import struct
import threading
from typing import Any

import numpy as np
import zstandard

from rlhf_cluster.errors import WeightError

BLOCK_ELEMENTS = 1 << 20
"""Elements per block. Part of the format: a reader must use the same number."""
_HEADER = struct.Struct("<II")
_GAP = np.dtype("<u4")
_LEVEL = 1
_MAX_CHANGED_FRACTION = 0.5  # beyond it the payload could exceed the tensor before it is compressed
SAMPLE = 1 << 16  # elements that are looked at first
_local = threading.local()  # compressors hold state and serve one thread


def encode(base: memoryview, new: memoryview, item_bytes: int) -> bytearray | None:
    """Return the payload that turns `base` into `new`: empty if they are equal.

    None if too many elements changed, of all or of a sample. Both are the bytes of contiguous
    elements of `item_bytes` (1, 2, 4 or 8), and have the same length. Raises `WeightError` where the
    lengths differ.
    """
    was, now = _elements(base, item_bytes), _elements(new, item_bytes)
    if was.shape != now.shape:
        raise WeightError(f"a difference of {len(base)} bytes and {len(new)}: they must be equal")
    few = slice(None, None, max(1, len(now) // SAMPLE))
    if np.count_nonzero(was[few] != now[few]) > _MAX_CHANGED_FRACTION * len(now[few]):
        return None
    payload = bytearray()
    num_changed = 0
    for start in range(0, len(now), BLOCK_ELEMENTS):
        block = slice(start, start + BLOCK_ELEMENTS)
        index = np.flatnonzero(was[block] != now[block])
        num_changed += len(index)
        if num_changed > _MAX_CHANGED_FRACTION * len(now):
            return None
        frame = _encode_block(was[block], now[block], index) if len(index) else b""
        payload += _HEADER.pack(len(index), len(frame)) + frame
    return payload if num_changed else bytearray()


def apply(target: memoryview, payload: bytes | bytearray | memoryview, item_bytes: int) -> None:
    """Turn `target`, which holds the base, into the new elements, in place.

    Raises `WeightError` on a payload that is damaged or does not fit; `target` is then undefined.
    """
    elements, data = _elements(target, item_bytes), memoryview(payload)
    if not data:
        return
    position = 0
    for start in range(0, len(elements), BLOCK_ELEMENTS):
        block = elements[start : start + BLOCK_ELEMENTS]
        if position + _HEADER.size > len(data):
            raise WeightError(f"the difference ends at byte {len(data)}, inside a block's header")
        num_changed, length = _HEADER.unpack_from(data, position)
        position += _HEADER.size
        if num_changed > len(block) or position + length > len(data):
            raise WeightError(
                f"the difference has a block of {num_changed} changes in {len(block)} elements and "
                f"{length} bytes, of which only {len(data) - position} follow"
            )
        if num_changed:
            _apply_block(block, num_changed, data[position : position + length])
        position += length
    if position != len(data):
        raise WeightError(f"the difference has {len(data) - position} bytes after its last block")


def _encode_block(was: Any, now: Any, index: Any) -> bytes:
    gaps = np.diff(index, prepend=-1) - 1
    values = _zigzag(now[index] - was[index])
    planes = _planes(gaps.astype(_GAP)) + _planes(values)
    return _codec()[0].compress(planes)


def _apply_block(block: Any, num_changed: int, frame: memoryview) -> None:
    item_bytes = block.dtype.itemsize
    expected = num_changed * (_GAP.itemsize + item_bytes)
    try:
        planes = _codec()[1].decompress(frame, max_output_size=expected)
    except zstandard.ZstdError as error:
        raise WeightError(f"the difference cannot be decompressed ({error})") from error
    if len(planes) != expected:
        raise WeightError(f"the difference has a frame of {len(planes)} bytes, expected {expected}")
    border = num_changed * _GAP.itemsize
    gaps = _unplanes(planes[:border], _GAP).astype(np.int64)
    index = np.cumsum(gaps + 1) - 1
    if index[-1] >= len(block):
        raise WeightError(f"the difference changes element {index[-1]} of a block of {len(block)}")
    block[index] += _unzigzag(_unplanes(planes[border:], block.dtype))


def _elements(data: memoryview, item_bytes: int) -> Any:
    return np.frombuffer(data, dtype=f"<u{item_bytes}")


def _zigzag(difference: Any) -> Any:
    """Map 0, -1, 1, -2, .. to 0, 1, 2, 3, .., so that all bytes but the lowest are small."""
    sign = difference >> (8 * difference.itemsize - 1)
    return (difference << 1) ^ (~sign + 1)


def _unzigzag(values: Any) -> Any:
    return (values >> 1) ^ (~(values & 1) + 1)


def _planes(values: Any) -> bytes:
    """Return all lowest bytes, then all second bytes, and so on, so that equal bytes are adjacent."""
    return values.view(np.uint8).reshape(len(values), -1).T.tobytes()


def _unplanes(data: bytes, dtype: Any) -> Any:
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return np.ascontiguousarray(planes.T).view(dtype).reshape(-1)


def _codec() -> tuple[zstandard.ZstdCompressor, zstandard.ZstdDecompressor]:
    if not hasattr(_local, "codec"):
        _local.codec = zstandard.ZstdCompressor(level=_LEVEL), zstandard.ZstdDecompressor()
    return _local.codec
