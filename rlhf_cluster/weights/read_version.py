"""Read a stored version: tensor by tensor, as a check only, or in a background thread.

`read` returns every tensor complete and verified:

- A version that was stored as a difference is rebuilt from the full version at the start of its
  chain. A version of adapters is merged with the weights in its anchor.
- A process that holds a version of the chain in memory (`Held`) continues from it, and reads only
  what was stored since.
- The hash of the whole tensor is verified in any case. It does not depend on how the version was
  stored.
- Versions come from a `ShardSource`: the files of the version, or another transport.
- All files are opened before the first tensor, so that retention cannot delete one in between.
- Damage, a missing file and a missing version of the chain are a `WeightError` that names the
  tensor and the file, or the version. The deadline is checked between two tensors.

`verify` reads every byte that a reader would use, compares hashes, and keeps nothing.

- Damage is a `WeightError` that names the file, and the tensor if the damage is in one: of several,
  the first in the manifest's order.
- Each thread reads one tensor at a time, which hides the latency of a storage. Hashing gains little.
  A version stored as a full snapshot needs `BUFFER_BYTES` of memory per thread, whatever the size
  of its tensors.
- A storage that hangs is not waited for past the deadline: `StalledError` names the first tensor
  that is missing.

`Staging` reads in a thread of the process that will apply the version, while that process keeps
working:

    begin --> report: None ... None --> {"digest": ..., "num_tensors": ...} or {"error": ...}

- `begin`, `report` and `cancel` return at once, whatever the storage does.
- Reads never overlap: while one hangs in a storage that does not answer, the next is refused.
- An error of a read is returned in its report, not raised. An exception would cross process borders
  as a bare text, and one of several processes must be able to refuse before any of them applies.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_digest

from rlhf_cluster.errors import RlhfError, StalledError, WeightError
from rlhf_cluster.util.tensor_hashing import (
    CHUNK_BYTES,
    hash_pieces,
    tensor_bytes,
    tensor_hash,
)
from rlhf_cluster.weights.formats import (
    delta,
    lora_factors,
)
from rlhf_cluster.weights.formats.stochastic_rounding import round_stochastically
from rlhf_cluster.weights.manifest import (
    ITEM_BYTES,
    Manifest,
    Part,
    TensorEntry,
    decode,
)
from rlhf_cluster.weights.shards import ShardFile, open_shards
from rlhf_cluster.weights.transports.shared_files import (
    MANIFEST_NAME,
    FileSource,
    gone,
)
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardSource,
)

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True, kw_only=True)
class Held:
    """Tensors that a process keeps in memory from one read to the next, by name, on the CPU.

    They are the complete, verified tensors of version `version`. Where versions are adapters, only the
    tensors that never change are kept, and `version` is their anchor.
    """

    version: int = -1
    digest: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def take(self, manifest: Manifest) -> Held:
        """Empty this, and return the tensors from which the read of `manifest` can begin.

        The result is empty where they are of no version that `manifest` builds on.
        """
        taken = Held(version=self.version, digest=self.digest, tensors=self.tensors)
        self.version, self.digest, self.tensors = -1, "", {}
        own = [] if manifest.format == "adapter" else [(manifest.version, manifest.digest)]
        known = [(link.version, link.digest) for link in manifest.chain] + own
        return taken if (taken.version, taken.digest) in known else Held()

    def put(self, manifest: Manifest, tensors: dict[str, Tensor]) -> None:
        """Keep `tensors` of a version that was read: those that the next read can begin with."""
        first = manifest.chain[0] if manifest.format == "adapter" and manifest.chain else manifest
        self.version, self.digest, self.tensors = first.version, first.digest, tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    """One version of a chain, open for reading."""

    where: str
    manifest: Manifest
    files: dict[str, ShardFile]
    stored: Mapping[str, TensorEntry]


def open_version(path: str | Path, source: ShardSource | None = None) -> Manifest:
    """Return the checked manifest of the version in folder `path`. Raises `WeightError`.

    With a `source`, the version of this number is opened there.
    """
    found = re.fullmatch(r"v(\d{6,})", Path(path).name)
    if found is None:
        raise WeightError(f"{path}: not the folder of a version; expected a name like v000042")
    return _manifest(source or FileSource(Path(path).parent), int(found[1]))


def _manifest(source: ShardSource, version: int) -> Manifest:
    where = source.where(version)
    manifest = decode(source.manifest(version), f"{where}/{MANIFEST_NAME}")
    if manifest.version != version:
        raise WeightError(
            f"{where}/{MANIFEST_NAME}: describes version {manifest.version}, found in "
            f"{where.rpartition('/')[2]}"
        )
    return manifest


def read(
    path: str | Path,
    verify: bool = True,
    expected_digest: str | None = None,
    held: Held | None = None,
    source: ShardSource | None = None,
    deadline: Deadline | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a version, complete, on the CPU, in the learner's order.

    The manifest is checked at once, the tensors as they are consumed. The hash of each is verified
    BEFORE it is yielded (unless `verify` is False). A consumer that must not see half a version
    collects all tensors first. Raises `WeightError` naming tensor and file; `StalledError` past the
    deadline. With a `source`, the version is read from there, and `path` is its name only.

    `held` is used when it is the version itself or one that it builds on. After the last tensor it
    holds the version that was read; before that, and after an error, it is empty. Its tensors may be
    those that were yielded, and the next read changes them in place.
    """
    source = source or FileSource(Path(path).parent)
    manifest = open_version(path, source)
    if expected_digest is not None and manifest.digest != expected_digest:
        raise WeightError(
            f"{path}: digest {manifest.digest}, expected {expected_digest}: not the version that "
            "was announced. Pull the latest version again"
        )
    return _read_tensors(source, manifest, verify, held, deadline)


def read_factors(
    path: str | Path,
    expected_digest: str,
    deadline: Deadline | None = None,
) -> tuple[Manifest, dict[str, Tensor]]:
    """Return the manifest of a version of adapters, and its adapters by name, verified, on the CPU.

    Nothing else of its files is read, and no file of the version that it builds on. Raises
    `WeightError` naming tensor and file, or for a version of another format; `StalledError` past the
    deadline.
    """
    source = FileSource(Path(path).parent)
    manifest = open_version(path, source)
    if (manifest.digest, manifest.format) != (expected_digest, "adapter"):
        raise WeightError(
            f"{path}: format {manifest.format!r} and digest {manifest.digest}, expected 'adapter' and "
            f"{expected_digest}: not the version that was announced. Pull the latest version again"
        )
    factors: dict[str, Tensor] = {}
    with ExitStack() as stack:
        link = _open_link(source, manifest, stack, deadline)
        for name, entry in manifest.factors.items():
            if not name.endswith(lora_factors.TRAINED):
                continue
            if deadline is not None:
                deadline.left_s(f"tensor {name!r}")
            factors[name] = _rebuild([link], name, None, entry)
            found = _hash(name, entry, factors[name])
            if found != entry.hash:
                held_by = ", ".join(link.files[part.file].where for part in entry.parts)
                raise WeightError(
                    f"tensor {name!r} has hash {found}, expected {entry.hash}: damaged in {held_by}. "
                    "Publish the version again"
                )
    return manifest, factors


def _read_tensors(
    source: ShardSource,
    manifest: Manifest,
    verify: bool,
    held: Held | None,
    deadline: Deadline | None,
) -> Iterator[tuple[str, Tensor]]:
    taken = held.take(manifest) if held is not None else Held()
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        chain = _open_chain(source, manifest, taken.version, stack, deadline)
        for name, entry in manifest.tensors.items():
            if deadline is not None:
                deadline.left_s(f"tensor {name!r}")
            tensor, stored = _whole(chain, manifest, name, taken.tensors)
            if verify and _hash(name, entry, tensor) != entry.hash:
                raise WeightError(_blame(source, manifest, name, taken, deadline))
            if held is not None:
                kept |= stored
            yield name, tensor
    if held is not None:
        held.put(manifest, kept)


def _whole(
    chain: list[_Link], manifest: Manifest, name: str, held: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return a tensor of the model, and the tensors that the next read can begin with."""

    def stored(name: str) -> Tensor:
        entry = manifest.factors.get(name) or manifest.tensors[name]
        return _rebuild(chain, name, held.pop(name, None), entry)

    entry = manifest.tensors[name]
    if entry.scale is None:
        tensor = stored(name)
        return tensor, {name: tensor}
    base, down, up = (
        stored(name + kind) for kind in (lora_factors.BASE, lora_factors.DOWN, lora_factors.UP)
    )
    gain = (
        stored(name + lora_factors.GAIN) if name + lora_factors.GAIN in manifest.factors else None
    )
    merged = lora_factors.merge(base.view(-1), 0, down, up, entry.scale, gain)
    if entry.stream is None:
        tensor = merged.to(_type(entry))
    else:
        tensor = round_stochastically(merged, 0, entry.stream)
    return tensor.view(entry.shape), {name + lora_factors.BASE: base}


def _open_chain(
    source: ShardSource,
    manifest: Manifest,
    after: int,
    stack: ExitStack,
    deadline: Deadline | None,
) -> list[_Link]:
    """Open the versions above `after` that make up `manifest`, itself the last, with all files."""
    where = source.where(manifest.version)
    links = []
    for link in manifest.chain:
        if link.version > after:
            try:
                base = _manifest(source, link.version)
                links.append(_open_link(source, base, stack, deadline))
            except WeightError as error:
                if not source.has(manifest.version):
                    raise WeightError(gone(where)) from error
                raise WeightError(
                    f"{where}: builds on version {link.version}, which cannot be read: {error}"
                ) from error
            if base.digest != link.digest:
                raise WeightError(
                    f"{where}: builds on version {link.version} with digest {link.digest}; the one "
                    f"in {links[-1].where} has {base.digest}. Publish the version again"
                )
    if manifest.version > after:
        links.append(_open_link(source, manifest, stack, deadline))
    return links


def _open_link(
    source: ShardSource, manifest: Manifest, stack: ExitStack, deadline: Deadline | None
) -> _Link:
    names = list(manifest.files)
    try:
        blobs = source.open(manifest.version, names, deadline)
        expected = [(e.num_bytes, e.header_hash) for e in manifest.files.values()]
        opened = open_shards(blobs, expected)
    except WeightError as error:
        if source.has(manifest.version):
            raise
        raise WeightError(gone(source.where(manifest.version))) from error
    files = {name: stack.enter_context(file) for name, file in zip(names, opened, strict=True)}
    return _Link(
        where=source.where(manifest.version), manifest=manifest, files=files, stored=manifest.stored
    )


def _rebuild(chain: list[_Link], name: str, tensor: Tensor | None, last: TensorEntry) -> Tensor:
    """Apply the versions of the chain to `tensor`, in place, and return it; None begins an empty one.

    `last` is the tensor's entry in the last version.
    """
    tensor = _empty(last) if tensor is None else tensor
    data = tensor_bytes(tensor)
    for link in chain:
        entry = link.stored.get(name)
        if entry is None or entry.num_bytes != len(data):
            raise WeightError(
                f"{link.where}: has no tensor {name!r} of {len(data)} bytes, on which a later "
                "version builds. Publish that version again"
            )
        item_bytes = ITEM_BYTES[entry.dtype]
        for part in entry.parts:
            start, stop = part.offset * item_bytes, (part.offset + part.numel) * item_bytes
            _fill(data[start:stop], name, entry, part, link.files[part.file])
    return tensor


def _fill(target: memoryview, name: str, entry: TensorEntry, part: Part, file: ShardFile) -> None:
    if part.delta_bytes is None:
        file.read_into(target, file.find(name, entry.dtype, part.numel))
    elif part.delta_bytes:
        payload = bytearray(part.delta_bytes)
        file.read_into(memoryview(payload), file.find(name, "uint8", part.delta_bytes))
        try:
            delta.apply(target, payload, ITEM_BYTES[entry.dtype])
        except WeightError as error:
            raise WeightError(
                f"tensor {name!r}: damaged in {file.where}: {error}. Publish the version again"
            ) from error


def _blame(
    source: ShardSource,
    manifest: Manifest,
    name: str,
    taken: Held,
    deadline: Deadline | None,
) -> str:
    """Return the message that says where the damage is, after tensor `name` had another hash.

    It names the files of the first version of the chain in which a hash differs. Where all agree, the
    copy in memory or the read was damaged.
    """
    is_merged = manifest.tensors[name].scale is not None
    with ExitStack() as stack:
        chain = _open_chain(source, manifest, -1, stack, deadline)
        for stored in lora_factors.factors_of(name, manifest.factors) if is_merged else [name]:
            tensor = _empty(manifest.stored[stored])
            for link in chain:
                entry = link.stored[stored]
                found = _hash(stored, entry, _rebuild([link], stored, tensor, entry))
                if found != entry.hash:
                    held_by = ", ".join(link.files[part.file].where for part in entry.parts)
                    return (
                        f"tensor {stored!r} has hash {found}, expected {entry.hash}: damaged in "
                        f"{held_by}. Publish the version again"
                    )
    held = taken.version >= 0
    damaged = f"the copy of version {taken.version} in memory" if held else "one of the reads"
    return (
        f"tensor {name!r} of {source.where(manifest.version)} did not come out as published, and its "
        f"files are whole: {damaged} was damaged"
        + (", or this machine merges adapters otherwise than the learner's" if is_merged else "")
        + ". Pull the version again"
    )


def _empty(entry: TensorEntry) -> Tensor:
    import torch

    return torch.empty(entry.shape, dtype=_type(entry))


def _type(entry: TensorEntry) -> Any:
    import torch

    return getattr(torch, entry.dtype)


def _hash(name: str, entry: TensorEntry, tensor: Tensor) -> str:
    return tensor_hash(name, entry.dtype, entry.shape, hash_pieces(tensor_bytes(tensor), 0))


BUFFER_BYTES = 256 * CHUNK_BYTES  # whole chunks: a tensor is read by as many bytes at once

MAX_THREADS = 8


def verify(
    path: str | Path,
    buffer_bytes: int = BUFFER_BYTES,
    deadline: Deadline | None = None,
    num_threads: int | None = None,
    source: ShardSource | None = None,
) -> None:
    """Check that the version in folder `path` is complete and undamaged.

    `num_threads`: by default one per core, up to `MAX_THREADS`. Raises `WeightError` where it is not;
    `StalledError` past the deadline.
    """
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
            stack.pop_all()  # a thread may hang in a file for ever: no file is closed while it does
            raise


class _Work:
    """Queue of tensors to check, in order, each taken by one thread."""

    def __init__(
        self, names: list[str], check: Callable[[str, memoryview], None], buffer_bytes: int
    ) -> None:
        self._names, self._check, self._buffer_bytes = names, check, buffer_bytes
        self._lock = threading.Lock()
        self._next = 0
        self._open = set(range(len(names)))
        self._failed: dict[int, Exception] = {}

    def run(self, num_threads: int, deadline: Deadline | None) -> None:
        """Check all tensors. Raises the error of the first one that failed; `StalledError`.

        Waits for: all threads, until the deadline. Threads that hang then are left behind.
        """
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
    """Return the hashes of a tensor's chunks; the parts of an entry are in order, without a hole."""
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


Report = dict[str, Any]


class Staging:
    """Background read of one process, one at a time."""

    def __init__(self) -> None:
        self._reading: threading.Thread | None = None
        self._deadline: Deadline | None = None
        self._report: Report | None = None

    def begin(self, read: Callable[[], Report], deadline: Deadline) -> Report | None:
        """Start `read`, which checks `deadline`. Return an error where the last read still hangs."""
        if self._reading is not None and self._reading.is_alive():
            return {"error": "the storage does not answer: an earlier version is still being read"}
        self._report, self._deadline = None, deadline
        self._reading = threading.Thread(target=self._run, args=(read,), name="stage", daemon=True)
        self._reading.start()
        return None

    def report(self) -> Report | None:
        """Return the result or the error of the read; None while it is running."""
        return self._report

    def cancel(self) -> None:
        """End the read the next time that it checks its deadline."""
        if self._deadline is not None:
            self._deadline.cancel()

    def _run(self, read: Callable[[], Report]) -> None:
        try:
            self._report = read()
        except Exception as error:  # of any kind: the report returns it to the caller
            self._report = {"error": f"{type(error).__name__}: {error}"}
