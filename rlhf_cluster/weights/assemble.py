"""From the ranks' reports to one checked manifest.

Promises: every report is of this version, every file is there with the length and header that were
reported, ranks agree on each tensor's shape and type, the parts cover each tensor once, and the
names are exactly the expected ones. Otherwise `WeightError`, and nothing has been changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError
from xxhash import xxh3_128_digest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.hashing import (
    CHUNK_BYTES,
    HASH_BYTES,
    combine_hashes,
    pieces,
    tensor_hash,
)
from rlhf_cluster.weights.manifest import (
    ITEM_BYTES,
    FileEntry,
    Manifest,
    Part,
    PartReport,
    ShardReport,
    TensorEntry,
    check_coverage,
    explain_problems,
)
from rlhf_cluster.weights.shards import ShardFile

_Held = tuple[str, PartReport]  # the file, and what it holds of one tensor


def assemble(
    folder: Path,
    version: int,
    reports: Sequence[ShardReport],
    expected: Mapping[str, tuple[int, ...]] | None,
    created_s: float,
) -> Manifest:
    """The manifest of the shards that `reports` describe in `folder`. Raises `WeightError`."""
    reports = sorted(reports, key=lambda report: report.rank)
    _check_reports(version, reports)
    held: dict[str, list[_Held]] = defaultdict(list)
    for report in reports:
        for name, part in report.parts.items():
            held[name].append((report.file, part))
    check_names(f"version {version}", {n: parts[0][1].shape for n, parts in held.items()}, expected)
    files: dict[str, ShardFile] = {}
    try:
        for report in reports:
            files[report.file] = file = ShardFile(folder / report.file, report.num_bytes)
            for name, part in report.parts.items():
                if part.numel:
                    file.find(name, part.dtype, part.numel)
        tensors = {name: _entry(name, parts, files) for name, parts in held.items()}
        entries = {
            report.file: FileEntry(
                num_bytes=report.num_bytes, header_hash=files[report.file].header_hash
            )
            for report in reports
        }
    finally:
        for file in files.values():
            file.close()
    try:
        return Manifest(
            version=version,
            created_s=created_s,
            digest=combine_hashes({name: entry.hash for name, entry in tensors.items()}),
            files=entries,
            tensors=tensors,
        )
    except ValidationError as error:
        raise WeightError(f"version {version}: {explain_problems(error)}") from error


def check_names(
    what: str,
    found: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]] | None,
) -> None:
    """Raise `WeightError` listing missing and extra tensors, and tensors of another shape."""
    if not found:
        raise WeightError(f"{what}: holds no tensors")
    if expected is None:
        return
    problems = [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    if missing := [name for name in expected if name not in found]:
        problems.append(f"missing: {_some(missing)}")
    if extra := [name for name in found if name not in expected]:
        problems.append(f"not expected: {_some(extra)}")
    if problems:
        raise WeightError(
            f"{what}: its tensors are not the model's. {'; '.join(problems)}. Every process "
            "must build the model from the same configuration (tied weights are stored once)"
        )


def _check_reports(version: int, reports: Iterable[ShardReport]) -> None:
    seen: dict[int, str] = {}
    for report in reports:
        if report.version != version:
            raise WeightError(
                f"version {version}: rank {report.rank} reports a shard of version {report.version}"
            )
        if report.rank in seen:
            raise WeightError(f"version {version}: rank {report.rank} reports two shards")
        seen[report.rank] = report.file


def _entry(name: str, held: list[_Held], files: Mapping[str, ShardFile]) -> TensorEntry:
    shape, dtype = held[0][1].shape, held[0][1].dtype
    for file, part in held:
        if (part.shape, part.dtype) != (shape, dtype):
            raise WeightError(
                f"tensor {name!r}: {file} holds a part of {part.dtype}{list(part.shape)}, "
                f"{held[0][0]} one of {dtype}{list(shape)}; all ranks must agree"
            )
    held = sorted((item for item in held if item[1].numel), key=lambda item: item[1].offset)
    parts = tuple(Part(file=file, offset=part.offset, numel=part.numel) for file, part in held)
    check_coverage(name, shape, parts)
    return TensorEntry(
        dtype=dtype,
        shape=shape,
        hash=tensor_hash(name, dtype, shape, _chunk_hashes(name, held, files)),
        parts=parts,
    )


def _chunk_hashes(name: str, held: list[_Held], files: Mapping[str, ShardFile]) -> bytes:
    """The hashes of a tensor's chunks: as reported, or read again where a chunk spans files."""
    hashes: list[bytes] = []
    open_chunk = b""  # the bytes of the chunk under way, once it turned out to span files
    for file, part in held:
        item_bytes = ITEM_BYTES[part.dtype]
        start, stop = part.offset * item_bytes, (part.offset + part.numel) * item_bytes
        whole = held[-1][1] is part
        for index, (a, b) in enumerate(pieces(start, stop)):
            reported = part.piece_hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            if a % CHUNK_BYTES == 0 and (b % CHUNK_BYTES == 0 or (whole and b == stop)):
                hashes.append(reported)
                continue
            data = bytearray(b - a)
            position = files[file].find(name, part.dtype, part.numel) + a - start
            files[file].read_into(memoryview(data), position)
            if xxh3_128_digest(data) != reported:
                raise WeightError(
                    f"tensor {name!r}: bytes {a} to {b} of it in {files[file].path} are not those "
                    "that were written; damaged. Publish the version again"
                )
            open_chunk += data
            if b % CHUNK_BYTES == 0 or (whole and b == stop):
                hashes.append(xxh3_128_digest(open_chunk))
                open_chunk = b""
    return b"".join(hashes)


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
