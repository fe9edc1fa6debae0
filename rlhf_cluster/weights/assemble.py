"""Assemble one checked manifest from the ranks' reports.

Promises, or a `WeightError` is raised and nothing has been changed:
- every report is of this version and against the same base;
- every file exists, with the length and header that were reported;
- ranks agree on each tensor's shape and type;
- the parts cover each tensor once;
- the names are exactly the expected ones, and those of the base.

Where tensors are merged from adapters, tensors that no rank reports are kept from the base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain

from pydantic import ValidationError
from xxhash import xxh3_128_digest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.util.tensor_hashing import (
    CHUNK_BYTES,
    HASH_BYTES,
    border_pieces,
    combine_hashes,
    is_whole_chunk,
    pieces,
    tensor_hash,
)
from rlhf_cluster.weights.formats import lora_factors
from rlhf_cluster.weights.manifest import (
    BORDERS,
    ITEM_BYTES,
    FileEntry,
    Link,
    Manifest,
    Part,
    PartReport,
    ShardReport,
    TensorEntry,
    check_coverage,
    explain_problems,
)
from rlhf_cluster.weights.shards import ShardFile, open_shards
from rlhf_cluster.weights.transports.transport import Blob

_Held = tuple[str, PartReport]  # the file, and the part of one tensor that it holds


def assemble(
    open_blobs: Callable[[Sequence[str]], list[Blob]],
    version: int,
    reports: Sequence[ShardReport],
    expected: Mapping[str, tuple[int, ...]] | None,
    base: Manifest | None,
    created_s: float,
) -> Manifest:
    """Return the manifest of the shards that `reports` describe. Raises `WeightError`.

    `open_blobs` opens files by name. Their headers are read, and the bytes of chunks that span ranks.
    """
    reports = sorted(reports, key=lambda report: report.rank)
    _check_reports(version, reports)
    held: dict[str, list[_Held]] = defaultdict(list)
    for report in reports:
        for name, part in report.parts.items():
            held[name].append((report.file, part))
    is_adapter = any(part.scale is not None for _, part in chain(*held.values()))
    kept = _keep_from_base(base, held) if base is not None and is_adapter else {}
    shapes = {name: entry.shape for name, entry in kept.items()}
    shapes |= {name: parts[0][1].shape for name, parts in held.items()}
    model = {name: shape for name, shape in shapes.items() if not lora_factors.is_factor(name)}
    check_names(f"version {version}", model, expected)
    files: dict[str, ShardFile] = {}
    try:
        names = [report.file for report in reports]
        opened = open_shards(open_blobs(names), [(r.num_bytes, None) for r in reports])
        files = dict(zip(names, opened, strict=True))
        for report in reports:
            for name, part in report.parts.items():
                _check_in_file(name, part, files[report.file])
        found = kept | {name: _entry(name, parts, files) for name, parts in held.items()}
        entries = {
            report.file: FileEntry(
                num_bytes=report.num_bytes, header_hash=files[report.file].header_hash
            )
            for report in reports
        }
    finally:
        for file in files.values():
            file.close()
    own_format = "adapter" if is_adapter else "full" if base is None else "delta"
    if base is not None:
        _check_against_base(version, own_format, found, base)
    order = base.tensors if base is not None else found
    tensors = {name: found[name] for name in order if not lora_factors.is_factor(name)}
    try:
        return Manifest(
            format=own_format,
            version=version,
            chain=chain_on(base),
            created_s=created_s,
            digest=combine_hashes({name: entry.hash for name, entry in tensors.items()}),
            files=entries,
            tensors=tensors,
            factors={name: entry for name, entry in found.items() if lora_factors.is_factor(name)},
        )
    except ValidationError as error:
        raise WeightError(f"version {version}: {explain_problems(error)}") from error


def _keep_from_base(base: Manifest, held: Mapping[str, object]) -> dict[str, TensorEntry]:
    """Return the entries of the base that a version of adapters does not change, without parts."""
    return {
        name: entry.model_copy(update={"parts": ()})
        for name, entry in base.stored.items()
        if name not in held and not name.endswith(lora_factors.TRAINED)
    }


def chain_on(base: Manifest | None) -> tuple[Link, ...]:
    """Return the chain of a version whose base is `base`: the versions that it builds on."""
    return (*base.chain, Link(version=base.version, digest=base.digest)) if base else ()


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


def _check_in_file(name: str, part: PartReport, file: ShardFile) -> None:
    if part.delta_bytes is None:
        if part.numel:
            file.find(name, part.dtype, part.numel)
    elif part.delta_bytes:
        file.find(name, "uint8", part.delta_bytes)


def _check_against_base(
    version: int, own_format: str, entries: Mapping[str, TensorEntry], base: Manifest
) -> None:
    if version <= base.version:
        raise WeightError(f"version {version} cannot build on version {base.version}, a later one")
    if (own_format == "adapter") != (base.format == "adapter"):
        raise WeightError(
            f"version {version} of format {own_format!r} cannot build on version {base.version} of "
            f"format {base.format!r}. Publish it as a full snapshot"
        )
    found = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
    listed = {**base.tensors, **base.factors}
    known = {name: (entry.dtype, entry.shape) for name, entry in listed.items()}
    if found != known:
        other = [name for name in {**known, **found} if found.get(name) != known.get(name)]
        raise WeightError(
            f"version {version} builds on version {base.version}, which has other tensors: "
            f"{_some(other)}. Publish it as a full snapshot"
        )


def _entry(name: str, held: list[_Held], files: Mapping[str, ShardFile]) -> TensorEntry:
    first = held[0][1]
    shape, dtype, scale, stream = agreed = first.shape, first.dtype, first.scale, first.stream
    for file, part in held:
        if (part.shape, part.dtype, part.scale, part.stream) != agreed:
            raise WeightError(
                f"tensor {name!r}: {file} holds a part of {part.dtype}{list(part.shape)} with scale "
                f"{part.scale} and stream {part.stream}, {held[0][0]} one of {dtype}{list(shape)} with "
                f"scale {scale} and stream {stream}; all ranks must agree"
            )
    held = sorted((item for item in held if item[1].numel), key=lambda item: item[1].offset)
    parts = tuple(
        Part(file=file, offset=part.offset, numel=part.numel, delta_bytes=part.delta_bytes)
        for file, part in held
    )
    check_coverage(name, shape, parts)
    return TensorEntry(
        dtype=dtype,
        shape=shape,
        hash=tensor_hash(name, dtype, shape, _chunk_hashes(name, held, files)),
        parts=parts if scale is None else (),
        scale=scale,
        stream=stream,
    )


def _chunk_hashes(name: str, held: list[_Held], files: Mapping[str, ShardFile]) -> bytes:
    """Return the hashes of a tensor's chunks: as reported, or computed where a chunk spans files."""
    hashes: list[bytes] = []
    open_chunk = b""  # the bytes so far of a chunk that spans files
    size = sum(part.numel * ITEM_BYTES[part.dtype] for _, part in held)
    for file, part in held:
        item_bytes = ITEM_BYTES[part.dtype]
        start, stop = part.offset * item_bytes, (part.offset + part.numel) * item_bytes
        for index, (a, b) in enumerate(pieces(start, stop)):
            reported = part.piece_hashes[index * HASH_BYTES : (index + 1) * HASH_BYTES]
            if is_whole_chunk(a, b, size):
                hashes.append(reported)
                continue
            data = bytearray(b - a)
            position = _border_position(name, part, files[file], size, a)
            files[file].read_into(memoryview(data), position)
            if xxh3_128_digest(data) != reported:
                raise WeightError(
                    f"tensor {name!r}: bytes {a} to {b} of it in {files[file].where} are not those "
                    "that were written; damaged. Publish the version again"
                )
            open_chunk += data
            if b % CHUNK_BYTES == 0 or b == size:
                hashes.append(xxh3_128_digest(open_chunk))
                open_chunk = b""
    return b"".join(hashes)


def _border_position(name: str, part: PartReport, file: ShardFile, size: int, piece: int) -> int:
    """Return the position in the file of the border piece that begins at byte `piece` of the tensor."""
    item_bytes = ITEM_BYTES[part.dtype]
    start, stop = part.offset * item_bytes, (part.offset + part.numel) * item_bytes
    if part.delta_bytes is None:
        return file.find(name, part.dtype, part.numel) + piece - start
    borders = border_pieces(start, stop, size)
    found = file.find(name + BORDERS, "uint8", sum(b - a for a, b in borders))
    return found + sum(b - a for a, b in borders if a < piece)


def _some(names: Sequence[str], limit: int = 8) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
