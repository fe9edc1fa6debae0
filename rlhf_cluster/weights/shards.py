"""Shard files: one safetensors file a rank and version, written aside and renamed, read by ranges.

Promises of the writing side: a rank writes only its own file, under a temporary name until it is
whole. The final name carries a hash of the content, so two publishes of the same version can never
mix their files. Space is checked before, and nothing is left behind by a write that failed.

Promises of the reading side: the file's length and header are verified when it is opened. Data is
read with `pread`, never mapped: a file that vanishes under a reader is an error, not a SIGBUS.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from xxhash import xxh3_64

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.hashing import dtype_name, hash_bytes, hash_pieces, tensor_bytes
from rlhf_cluster.weights.manifest import ITEM_BYTES, LocalPart, PartReport, ShardReport

if TYPE_CHECKING:
    from torch import Tensor

_SAFETENSORS_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_LENGTH_BYTES = 8  # a safetensors file starts with the length of its JSON header
_MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


def version_dir(root: str | Path, version: int) -> Path:
    """The folder of a published version."""
    return Path(root).absolute() / f"v{version:06d}"


def partial_dir(root: str | Path, version: int) -> Path:
    """The folder in which a version is put together."""
    return version_dir(root, version).with_suffix(".partial")


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def write_shard(
    root: str | Path,
    version: int,
    rank: int,
    parts: Iterable[LocalPart],
    *,
    fsync: bool = False,
    free_bytes: Callable[[Path], int] = free_bytes,
) -> ShardReport:
    """Write one rank's parts of a version that is not yet visible. `commit` makes it so.

    A rank that holds nothing of a tensor may pass an empty part or none. The file is replaced when
    the same rank writes the same parts again. Raises `WeightError`: bad part, no space, I/O error.
    """
    tensors: dict[str, Tensor] = {}
    reports: dict[str, PartReport] = {}
    for part in parts:
        _check_part(part, rank, reports)
        item_bytes = ITEM_BYTES[dtype_name(part.tensor)]
        reports[part.name] = PartReport(
            shape=tuple(part.shape),
            dtype=dtype_name(part.tensor),
            offset=part.offset,
            numel=part.tensor.numel(),
            piece_hashes=hash_pieces(tensor_bytes(part.tensor), part.offset * item_bytes),
        )
        if part.tensor.numel():
            tensors[part.name] = part.tensor.detach()
    folder = partial_dir(root, version)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_space(folder, tensors, free_bytes)
        path = folder / f"shard-{rank:05d}-{_content_key(reports)}.safetensors"
        _save(tensors, path, fsync)
        num_bytes = path.stat().st_size
    except OSError as error:
        raise WeightError(
            f"version {version}, rank {rank}: cannot write a shard in {folder} ({error})"
        ) from error
    return ShardReport(
        version=version, rank=rank, file=path.name, num_bytes=num_bytes, parts=reports
    )


class ShardFile:
    """A shard open for reading. Raises `WeightError` naming the file whenever it is not whole.

    `positions` maps a tensor's name to (dtype, number of elements, position of its first byte).
    """

    def __init__(self, path: Path, num_bytes: int, header_hash: str | None = None) -> None:
        self.path = path
        self.positions: dict[str, tuple[str, int, int]] = {}
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise WeightError(f"{path}: the shard file is missing") from error
        except OSError as error:
            raise WeightError(f"{path}: cannot open the shard file ({error})") from error
        try:
            self._read_header(num_bytes, header_hash)
        except BaseException:
            self.close()
            raise

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
        os.close(self._fd)

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` with the bytes at `position`."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._fd, [target[done:]], position + done)
            except OSError as error:
                raise WeightError(f"{self.path}: cannot read the shard file ({error})") from error
            if count == 0:
                raise WeightError(
                    f"{self.path}: ends at byte {position + done}, expected {len(target)} bytes "
                    f"from {position} on; the file is truncated"
                )
            done += count

    def find(self, name: str, dtype: str, numel: int) -> int:
        """The position of a tensor's part, which must have this type and length."""
        found = self.positions.get(name)
        if found is None or found[:2] != (dtype, numel):
            has = f"{found[1]} elements of {found[0]}" if found else "nothing"
            raise WeightError(
                f"{self.path}: has {has} under {name!r}, expected {numel} elements of {dtype}"
            )
        return found[2]

    def _read_header(self, num_bytes: int, header_hash: str | None) -> None:
        size = os.fstat(self._fd).st_size
        if size != num_bytes:
            raise WeightError(f"{self.path}: {size} bytes, expected {num_bytes}; the file is torn")
        prefix = self._read(0, _LENGTH_BYTES)
        length = int.from_bytes(prefix, "little")
        if not 0 < length <= min(size - _LENGTH_BYTES, _MAX_HEADER_BYTES):
            raise WeightError(f"{self.path}: header of {length} bytes in a file of {size}; damaged")
        header = self._read(_LENGTH_BYTES, length)
        self.header_hash = hash_bytes(prefix + header)
        if header_hash is not None and self.header_hash != header_hash:
            raise WeightError(
                f"{self.path}: the header has hash {self.header_hash}, expected {header_hash}; "
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
            raise WeightError(f"{self.path}: not a safetensors header ({error!r})") from error

    def _read(self, position: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), position)
        return bytes(buffer)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _check_part(part: LocalPart, rank: int, seen: dict[str, PartReport]) -> None:
    tensor = part.tensor
    where = f"rank {rank}, tensor {part.name!r}"
    if part.name in seen:
        raise WeightError(f"{where}: given twice; a rank has at most one range of a tensor")
    if not part.name or part.name == "__metadata__":
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


def _check_space(
    folder: Path, tensors: dict[str, Tensor], free_bytes: Callable[[Path], int]
) -> None:
    # The header holds name, type, shape and two offsets of each tensor.
    header = sum(200 + len(name) for name in tensors)
    needed = header + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    free = free_bytes(folder)
    if needed > free:
        raise WeightError(
            f"{folder}: a shard needs {needed} bytes and {free} are free. Free space, keep fewer "
            "versions, or give weights.root another folder"
        )


def _content_key(reports: dict[str, PartReport]) -> str:
    key = xxh3_64()
    for name, part in reports.items():
        header = json.dumps([name, part.dtype, part.shape, part.offset, part.numel])
        key.update(header.encode())
        key.update(part.piece_hashes)
    return key.hexdigest()


def _save(tensors: dict[str, Tensor], path: Path, fsync: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_suffix(f".tmp-{os.getpid()}")
    try:
        save_file(tensors, temporary)
        if fsync:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
        if fsync:
            sync_folder(path.parent)
    except SafetensorError as error:
        raise WeightError(f"{path}: cannot write the shard file ({error})") from error
    except RuntimeError as error:  # how the library refuses two names for one memory
        raise WeightError(
            f"{path}: tensors share memory; store tied weights once, under one name ({error})"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
