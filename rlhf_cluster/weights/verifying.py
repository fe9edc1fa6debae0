"""Reading all of a stored version to say whether it is whole, and keeping nothing of it.

Promises: every byte that a reader of the version would use is read and compared with its hash;
damage is a `WeightError` that names the file, and the tensor where it is in one. A version that is
stored in full needs `BUFFER_BYTES` of memory, whatever the size of its tensors.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from xxhash import xxh3_128_digest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.files import FileSource
from rlhf_cluster.weights.hashing import CHUNK_BYTES, tensor_hash
from rlhf_cluster.weights.manifest import ITEM_BYTES, TensorEntry
from rlhf_cluster.weights.reading import open_version, read
from rlhf_cluster.weights.shards import ShardFile, open_shards

BUFFER_BYTES = 256 * CHUNK_BYTES  # whole chunks: a tensor is read by as many bytes at once


def verify(path: str | Path, buffer_bytes: int = BUFFER_BYTES) -> None:
    """Raises `WeightError` unless the version in folder `path` is whole."""
    source = FileSource(Path(path).parent)
    manifest = open_version(path, source)
    if manifest.format != "full":
        for _ in read(path, source=source):
            pass
        return
    names = list(manifest.files)
    expected = [(entry.num_bytes, entry.header_hash) for entry in manifest.files.values()]
    with ExitStack() as stack:
        opened = open_shards(source.open(manifest.version, names), expected)
        files = {n: stack.enter_context(file) for n, file in zip(names, opened, strict=True)}
        buffer = memoryview(bytearray(buffer_bytes))
        for name, entry in manifest.tensors.items():
            found = tensor_hash(name, entry.dtype, entry.shape, _chunks(name, entry, files, buffer))
            if found != entry.hash:
                held_by = ", ".join(files[part.file].where for part in entry.parts)
                raise WeightError(
                    f"tensor {name!r} has hash {found}, expected {entry.hash}: damaged in {held_by}"
                )


def _chunks(
    name: str, entry: TensorEntry, files: dict[str, ShardFile], buffer: memoryview
) -> bytes:
    """The hashes of a tensor's chunks; the parts of an entry are in order and leave no hole."""
    hashes: list[bytes] = []
    filled, item_bytes = 0, ITEM_BYTES[entry.dtype]
    for part in entry.parts:
        file = files[part.file]
        position, left = file.find(name, entry.dtype, part.numel), part.numel * item_bytes
        while left:
            count = min(left, len(buffer) - filled)
            file.read_into(buffer[filled : filled + count], position)
            position, left, filled = position + count, left - count, filled + count
            if filled == len(buffer):
                hashes += _hashes(buffer)
                filled = 0
    return b"".join(hashes + _hashes(buffer[:filled]))


def _hashes(data: memoryview) -> list[bytes]:
    return [xxh3_128_digest(data[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)]
