"""Reading all of a stored version to say whether it is whole, and keeping nothing of it.

Promises: every byte that a reader of the version would use is read and compared with its hash;
damage is a `WeightError` that names the file, and the tensor where it is in one: of several, the
first in the manifest's order. Several threads read side by side, a tensor each, which hides the latency
of a storage; hashing itself gains little by them. A version that is stored in full needs `BUFFER_BYTES`
of memory a thread, whatever the size of its tensors. Nothing waits past the deadline for a storage that
hangs: `StalledError` names the first tensor that is missing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from xxhash import xxh3_128_digest

from rlhf_cluster.errors import RlhfError, StalledError, WeightError
from rlhf_cluster.weights.files import FileSource
from rlhf_cluster.weights.hashing import CHUNK_BYTES, tensor_hash
from rlhf_cluster.weights.manifest import ITEM_BYTES, TensorEntry
from rlhf_cluster.weights.reading import open_version, read
from rlhf_cluster.weights.shards import ShardFile, open_shards
from rlhf_cluster.weights.transport import Deadline, ShardSource

BUFFER_BYTES = 256 * CHUNK_BYTES  # whole chunks: a tensor is read by as many bytes at once
MAX_THREADS = 8


def verify(
    path: str | Path,
    buffer_bytes: int = BUFFER_BYTES,
    deadline: Deadline | None = None,
    num_threads: int | None = None,
    source: ShardSource | None = None,
) -> None:
    """Raises `WeightError` unless the version in folder `path` is whole; `StalledError` past the
    deadline. `num_threads`: by default one a core, up to `MAX_THREADS`."""
    source = source or FileSource(Path(path).parent)
    manifest = open_version(path, source)
    if manifest.format != "full":
        for _ in read(path, source=source, deadline=deadline):
            pass
        return
    names = list(manifest.files)
    expected = [(entry.num_bytes, entry.header_hash) for entry in manifest.files.values()]
    with ExitStack() as stack:
        opened = open_shards(source.open(manifest.version, names, deadline), expected)
        files = {n: stack.enter_context(file) for n, file in zip(names, opened, strict=True)}

        def check(name: str, buffer: memoryview) -> None:
            entry = manifest.tensors[name]
            found = tensor_hash(name, entry.dtype, entry.shape, _chunks(name, entry, files, buffer))
            if found != entry.hash:
                held_by = ", ".join(files[part.file].where for part in entry.parts)
                raise WeightError(
                    f"tensor {name!r} has hash {found}, expected {entry.hash}: damaged in {held_by}"
                )

        work = _Work(list(manifest.tensors), check, buffer_bytes)
        try:
            work.run(num_threads or min(MAX_THREADS, os.cpu_count() or 1), deadline)
        except StalledError:
            stack.pop_all()  # a thread may be at a file for ever: none of them is closed under it
            raise


class _Work:
    """Tensors in order, each taken by one thread."""

    def __init__(
        self, names: list[str], check: Callable[[str, memoryview], None], buffer_bytes: int
    ) -> None:
        self._names, self._check, self._buffer_bytes = names, check, buffer_bytes
        self._lock = threading.Lock()
        self._next = 0
        self._open = set(range(len(names)))
        self._failed: dict[int, Exception] = {}

    def run(self, num_threads: int, deadline: Deadline | None) -> None:
        """Waits for: all threads, until the deadline. Those that hang then are left behind."""
        if deadline is not None:
            deadline.left_s(self._missing())
        count = min(num_threads, len(self._names))
        threads = [threading.Thread(target=self._take, daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(None if deadline is None else deadline.left_s(self._missing()))
        except RlhfError:
            with self._lock:
                self._next = len(self._names)
            raise
        if self._failed:
            raise self._failed[min(self._failed)]

    def _missing(self) -> str:
        with self._lock:
            missing = len(self._open)
            first = self._names[min(self._open)] if self._open else "nothing"
        return f"{missing} of {len(self._names)} tensors, {first!r} first"

    def _take(self) -> None:
        buffer = memoryview(bytearray(self._buffer_bytes))
        while True:
            with self._lock:
                index = self._next
                if index >= len(self._names) or self._failed:
                    return
                self._next += 1
            try:
                self._check(self._names[index], buffer)
            except Exception as error:
                with self._lock:
                    self._failed[index] = error
            with self._lock:
                self._open.discard(index)


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
