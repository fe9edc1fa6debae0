"""Hashes of tensors that do not depend on how the tensors were sharded.

A tensor's bytes are cut into chunks of `CHUNK_BYTES`, counted from the tensor's first byte:

    chunk hash  = xxh3_128(chunk)
    tensor hash = xxh3_128(name, type, shape as JSON, newline, chunk hashes in order)
    digest      = xxh3_128(tensor hashes in order of the tensors' names)

A rank that holds a range of a tensor hashes the pieces between chunk borders from its own memory.
Only a chunk that spans two ranks (`border_pieces`) has to be read again when the version is
assembled. xxh3 detects damage, not forgery: every process that can write the store is trusted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from xxhash import xxh3_128_digest, xxh3_128_hexdigest

if TYPE_CHECKING:
    from torch import Tensor

CHUNK_BYTES = 1 << 16
"""Bytes per chunk, a multiple of every element size. Part of the digest's definition."""
HASH_BYTES = 16
HASH_SCHEME = "xxh3_128/64KiB"


def pieces(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut the byte range [start, stop) of a tensor at the chunk borders inside it."""
    while start < stop:
        end = min((start // CHUNK_BYTES + 1) * CHUNK_BYTES, stop)
        yield start, end
        start = end


def border_pieces(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """Return the pieces of [start, stop) that are not a whole chunk of a tensor of `size` bytes."""
    return [(a, b) for a, b in pieces(start, stop) if not is_whole_chunk(a, b, size)]


def is_whole_chunk(start: int, stop: int, size: int) -> bool:
    return start % CHUNK_BYTES == 0 and (stop % CHUNK_BYTES == 0 or stop == size)


def hash_pieces(data: memoryview, start: int) -> bytes:
    """Return the hashes, `HASH_BYTES` each, of the pieces of `data`.

    The first byte of `data` is byte `start` of the tensor.
    """
    return b"".join(
        xxh3_128_digest(data[a - start : b - start]) for a, b in pieces(start, start + len(data))
    )


def hash_bytes(data: bytes | memoryview) -> str:
    return xxh3_128_hexdigest(data)


def tensor_hash(name: str, dtype: str, shape: Sequence[int], chunk_hashes: bytes) -> str:
    """Return the hash of a tensor from the hashes of all its chunks in order."""
    header = json.dumps([name, dtype, list(shape)]).encode()
    return xxh3_128_hexdigest(header + b"\n" + chunk_hashes)


def combine_hashes(tensor_hashes: Mapping[str, str]) -> str:
    """Return the digest of a set of tensors from their hashes by name."""
    return xxh3_128_hexdigest(
        "".join(tensor_hashes[name] for name in sorted(tensor_hashes)).encode()
    )


def compute_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the digest of a version with exactly these tensors (full shape, on the CPU)."""
    return combine_hashes({name: hash_tensor(name, tensor) for name, tensor in tensors})


def hash_tensor(name: str, tensor: Tensor) -> str:
    """Return the hash of a tensor, complete and on the CPU."""
    hashes = hash_pieces(tensor_bytes(tensor), 0)
    return tensor_hash(name, dtype_name(tensor), tuple(tensor.shape), hashes)


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's memory, flattened, without a copy when it is contiguous."""
    import torch

    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
