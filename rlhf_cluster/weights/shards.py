"""Shards: one safetensors file per rank and version, made in memory, read by ranges.

Promises of the writing side:
- The file name carries a hash of the content, so two publishes of the same version can never mix
  their files.
- The tensors' memory is not copied (`ShardImage`). A transport writes it as is.

With a base, a part is stored as the difference from the same elements of the base, where that is
shorter. The base is what this rank wrote for that version, kept in its memory. A part that the base
does not hold in the same range and type is stored complete.

For a part with a `scale`, only the hashes are kept, and the bytes that the commit reads where a chunk
spans two ranks. The factors that it was merged from are stored as separate parts.

Promise of the reading side: the file's length and header are verified when it is opened, whatever
the transport.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from xxhash import xxh3_64

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import (
    border_pieces,
    dtype_name,
    hash_bytes,
    hash_pieces,
    tensor_bytes,
)
from rlhf_cluster.weights.formats import delta
from rlhf_cluster.weights.manifest import (
    BORDERS,
    ITEM_BYTES,
    LocalPart,
    PartReport,
    ShardReport,
)
from rlhf_cluster.weights.transports.shared_files import (
    FileSink,
    free_bytes,
)
from rlhf_cluster.weights.transports.transport import (
    Blob,
    ShardImage,
    ShardSink,
)

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS_TYPES = {
    "I64": "int64",
    "F64": "float64",
    "F32": "float32",
    "I32": "int32",
    "BF16": "bfloat16",
    "F16": "float16",
    "I16": "int16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
"""Torch names of the safetensors types, in the order of the library's file layout, widest first."""
_TYPE_NAMES = {name: key for key, name in _SAFETENSORS_TYPES.items()}
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
_MAX_THREADS = 4  # of a rank; ranks of one machine publish at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardBase:
    """Parts that this rank published as `version`, by name. Their tensors must not be written to.

    A part that is not among them is stored complete.
    """

    version: int
    parts: Mapping[str, LocalPart]


def write_shard(
    root: str | Path,
    version: int,
    rank: int,
    parts: Iterable[LocalPart],
    *,
    base: ShardBase | None = None,
    fsync: bool = False,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> ShardReport:
    """Call `send_shard` with a file sink of the store `root`."""
    sink = FileSink(root, fsync=fsync, free_bytes=free_bytes)
    return send_shard([sink], version, rank, parts, base)


def send_shard(
    sinks: Iterable[ShardSink],
    version: int,
    rank: int,
    parts: Iterable[LocalPart],
    base: ShardBase | None = None,
) -> ShardReport:
    """Write one rank's parts of a version, which is not visible yet, to all `sinks`.

    A rank that holds nothing of a tensor may pass an empty part or none. The file is replaced when
    the same rank writes the same parts again. With a `base`, all ranks must pass one of the same
    version. Raises `WeightError`: bad part, no space, I/O error; `StalledError`.
    """
    tensors: dict[str, Tensor] = {}
    reports: dict[str, PartReport] = {}
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1), "shard") as threads:
        checked = _check_parts(parts, rank)
        for name, stored, report in threads.map(lambda part: _make_entry(part, base), checked):
            tensors |= stored
            reports[name] = report
    number = base.version if base is not None else None
    name = f"shard-{rank:05d}-{_content_key(reports, number)}.safetensors"
    image = _image(name, tensors)
    for sink in sinks:
        sink.write(version, name, image)
    return ShardReport(
        version=version,
        base=number,
        rank=rank,
        file=name,
        num_bytes=image.num_bytes,
        parts=reports,
    )


class ShardFile:
    """A shard open for reading. Raises `WeightError` naming the file whenever it is not intact.

    `positions` maps a tensor's name to (dtype, number of elements, position of its first byte).
    """

    def __init__(self, blob: Blob, num_bytes: int, header_hash: str | None = None) -> None:
        """Read and check the header. `blob` is closed with this, and left open when this raises."""
        self._blob = blob
        self.positions: dict[str, tuple[str, int, int]] = {}
        self._read_header(num_bytes, header_hash)

    @property
    def where(self) -> str:
        return self._blob.where

    def __enter__(self) -> ShardFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self._blob.close()

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` with the bytes at `position`."""
        self._blob.read_into(target, position)

    def find(self, name: str, dtype: str, numel: int) -> int:
        """Return the position of a tensor's part, which must have this type and length.

        Raises `WeightError` where it has not.
        """
        found = self.positions.get(name)
        if found is None or found[:2] != (dtype, numel):
            has = f"{found[1]} elements of {found[0]}" if found else "nothing"
            raise WeightError(
                f"{self.where}: has {has} under {name!r}, expected {numel} elements of {dtype}"
            )
        return found[2]

    def _read_header(self, num_bytes: int, header_hash: str | None) -> None:
        size = self._blob.num_bytes
        if size != num_bytes:
            raise WeightError(f"{self.where}: {size} bytes, expected {num_bytes}; the file is torn")
        prefix = self._read(0, _LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if not 0 < length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise WeightError(
                f"{self.where}: header of {length} bytes in a file of {size}; damaged"
            )
        header = self._read(_LENGTH_BYTES, length)
        self.header_hash = hash_bytes(prefix + header)
        if header_hash is not None and self.header_hash != header_hash:
            raise WeightError(
                f"{self.where}: the header has hash {self.header_hash}, expected {header_hash}; "
                "damaged"
            )
        try:
            tree = json.loads(header)
            tree.pop("__metadata__", None)
            for name, entry in tree.items():
                dtype = _SAFETENSORS_TYPES[entry["dtype"]]
                start, stop = entry["data_offsets"]
                numel = (stop - start) // ITEM_BYTES[dtype]
                self.positions[name] = (dtype, numel, _LENGTH_BYTES + length + start)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightError(f"{self.where}: not a safetensors header ({error!r})") from error

    def _read(self, position: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), position)
        return bytes(buffer)


def open_shards(
    blobs: Sequence[Blob], expected: Sequence[tuple[int, str | None]]
) -> list[ShardFile]:
    """Open one shard per blob. `expected`: the length and the header's hash of each.

    Owns the blobs from the call on: when it raises `WeightError`, none of them stays open.
    """
    files: list[ShardFile] = []
    try:
        for blob, (num_bytes, header_hash) in zip(blobs, expected, strict=True):
            files.append(ShardFile(blob, num_bytes, header_hash))
    except WeightError:
        for blob in blobs:
            blob.close()
        raise
    return files


def _check_parts(parts: Iterable[LocalPart], rank: int) -> Iterator[LocalPart]:
    seen: set[str] = set()
    for part in parts:
        _check_part(part, rank, seen)
        seen.add(part.name)
        yield part


def _check_part(part: LocalPart, rank: int, seen: set[str]) -> None:
    tensor = part.tensor
    where = f"rank {rank}, tensor {part.name!r}"
    if part.name in seen:
        raise WeightError(f"{where}: given twice; a rank has at most one range of a tensor")
    if not part.name or part.name == "__metadata__" or part.name.endswith(BORDERS):
        raise WeightError(f"rank {rank}: {part.name!r} cannot be the name of a tensor")
    if tensor.dim() != 1 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise WeightError(
            f"{where}: shape {list(tensor.shape)} on {tensor.device}; a part must be flat, "
            "contiguous and on the CPU. Copy it with tensor.detach().cpu().reshape(-1)"
        )
    if dtype_name(tensor) not in ITEM_BYTES:
        raise WeightError(
            f"{where}: dtype {tensor.dtype} cannot be stored; use {', '.join(ITEM_BYTES)}"
        )
    if part.offset < 0:
        raise WeightError(f"{where}: offset {part.offset} is negative")


def _make_entry(
    part: LocalPart, base: ShardBase | None
) -> tuple[str, dict[str, Tensor], PartReport]:
    """Return the part's name, the tensors to write to the file by their names there, and its report."""
    dtype = dtype_name(part.tensor)
    stored, delta_bytes = _encode(part, base)
    report = PartReport(
        shape=tuple(part.shape),
        dtype=dtype,
        offset=part.offset,
        numel=part.tensor.numel(),
        piece_hashes=hash_pieces(tensor_bytes(part.tensor), part.offset * ITEM_BYTES[dtype]),
        delta_bytes=delta_bytes,
        scale=part.scale,
        stream=part.stream if part.scale is not None else None,
    )
    return part.name, stored, report


def _encode(part: LocalPart, base: ShardBase | None) -> tuple[dict[str, Tensor], int | None]:
    """Return the tensors to write for a part, by name in the file, and its `delta_bytes`."""
    full = {part.name: part.tensor.detach()} if part.tensor.numel() else {}
    if part.scale is not None:
        return _as_tensors({part.name + BORDERS: _borders(part)}), 0
    was = base.parts.get(part.name) if base is not None else None
    if not full or was is None or _place(was) != _place(part):
        return full, None
    data, item_bytes = tensor_bytes(part.tensor), ITEM_BYTES[dtype_name(part.tensor)]
    payload = delta.encode(tensor_bytes(was.tensor), data, item_bytes)
    borders = _borders(part)
    if payload is None or len(payload) + len(borders) >= len(data):
        return full, None
    return _as_tensors({part.name: payload, part.name + BORDERS: borders}), len(payload)


def _borders(part: LocalPart) -> bytearray:
    data, item_bytes = tensor_bytes(part.tensor), ITEM_BYTES[dtype_name(part.tensor)]
    start, size = part.offset * item_bytes, math.prod(part.shape) * item_bytes
    spanning = border_pieces(start, start + len(data), size)
    return bytearray().join(data[a - start : b - start] for a, b in spanning)


def _as_tensors(payloads: Mapping[str, bytearray]) -> dict[str, Tensor]:
    import torch

    return {k: torch.frombuffer(v, dtype=torch.uint8) for k, v in payloads.items() if v}


def _place(part: LocalPart) -> tuple[object, ...]:
    return tuple(part.shape), part.offset, part.tensor.numel(), part.tensor.dtype


def _content_key(reports: dict[str, PartReport], base: int | None) -> str:
    key = xxh3_64(json.dumps(base).encode())
    for name, part in reports.items():
        shape = [part.shape, part.offset, part.numel]
        header = [name, part.dtype, *shape, part.delta_bytes, part.scale, part.stream]
        key.update(json.dumps(header).encode())
        key.update(part.piece_hashes)
    return key.hexdigest()


def _image(name: str, tensors: Mapping[str, Tensor]) -> ShardImage:
    """Return the safetensors file of `tensors`, in the library's layout."""
    data = {key: tensor_bytes(tensor) for key, tensor in tensors.items()}
    _refuse_shared_memory(name, tensors)
    ranks = {dtype: rank for rank, dtype in enumerate(_TYPE_NAMES)}
    order = sorted(tensors, key=lambda key: (ranks[dtype_name(tensors[key])], key))
    header: dict[str, object] = {}
    end = 0
    for key in order:
        start, end = end, end + len(data[key])
        header[key] = {
            "dtype": _TYPE_NAMES[dtype_name(tensors[key])],
            "shape": list(tensors[key].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    prefix = memoryview(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
    return ShardImage(chunks=(prefix, *(data[key] for key in order)))


def _refuse_shared_memory(name: str, tensors: Mapping[str, Tensor]) -> None:
    reached, before = 0, ""
    for start, size, key in sorted((t.data_ptr(), t.nbytes, k) for k, t in tensors.items()):
        if start < reached:
            raise WeightError(
                f"{name}: tensors share memory; store tied weights once, by a single name "
                f"({before!r} and {key!r})"
            )
        reached, before = start + size, key
