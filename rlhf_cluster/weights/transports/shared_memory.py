"""Shared memory as transport: shards are objects of a store that processes share, such as Ray's.

    rank      ObjectSink         two objects: the shard, and the little of it that the commit reads
    rank 0    commit_objects     all ranks' edges -> manifest -> Directory.publish
    reader    ObjectSource       Directory.find -> the shards' objects -> blobs, read without a copy

Promises:
- a version is in the directory with all its shards or not at all, its manifest checked as a file's;
- the directory keeps the newest `keep` versions and what they build on; it holds the only lasting
  references, so that the objects of any other version are given back;
- an object that is gone (its writer died, it was evicted) is looked for in the file store, where
  durable versions are; a version that is in neither is a `WeightError` that names the object;
- no process but rank 0 opens another rank's shard for a commit, and rank 0 only its edges.

The files of a durable version hold the same bytes under the same names, so its manifest holds for
both. Handles are opaque here: a `Shelf` makes them and `Objects` turns them back into bytes.
"""

from __future__ import annotations

import functools
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from rlhf_cluster.errors import FencedError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.assemble import assemble, border_ranges
from rlhf_cluster.weights.manifest import ShardReport, encode
from rlhf_cluster.weights.shards import ShardFile
from rlhf_cluster.weights.transports.shared_files import (
    FileSource,
    gone,
    version_dir,
)
from rlhf_cluster.weights.transports.transport import (
    Blob,
    Deadline,
    ShardImage,
)

Handle = Any
_Bytes = bytes | bytearray | memoryview


class Shelf(Protocol):
    """Where objects are put. Each is a sequence of chunks of bytes, and never changes."""

    def put(self, chunks: Sequence[_Bytes]) -> Handle:
        """Copy `chunks` into an object. Raises `WeightError` when there is no room."""
        ...


class Objects(Protocol):
    """Where objects are fetched from."""

    def fetch(self, handles: Sequence[Handle], deadline: Deadline) -> Sequence[Sequence[_Bytes]]:
        """The chunks of every object. Raises `WeightError` when one is gone; `StalledError`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShard:
    """One rank's shard as objects. `edges` holds the header and the pieces that a commit reads, in
    the order of their `positions`."""

    report: ShardReport
    data: Handle
    edges: Handle
    positions: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the directory knows of a version: `shards` are handles by file name."""

    manifest: bytes
    digest: str
    builds_on: tuple[int, ...]
    num_bytes: int
    shards: Mapping[str, Handle]


class Directory:
    """Which versions there are, and the handles of their shards. Serves one thread at a time."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._attempt = 0

    def publish(self, version: int, entry: Entry, keep: int, attempt: int = 0) -> None:
        """Make `version` visible, and let go of what retention does not keep.

        The newest version may be published again with equal tensors: its objects are replaced.
        Raises `WeightError`: older than the newest, or another digest. `FencedError`: a later attempt
        has begun, or published.
        """
        self._check(attempt)
        newest = max(self._entries, default=-1)
        if version < newest:
            raise WeightError(
                f"version {version} is older than the latest, {newest}: publishing goes forward"
            )
        if version == newest and entry.digest != self._entries[version].digest:
            raise WeightError(
                f"version {version} is already published with digest "
                f"{self._entries[version].digest}, this one has {entry.digest}: versions never "
                "change. Publish under the next number"
            )
        self._entries[version] = entry
        kept = set(sorted(self._entries)[-keep:])
        kept |= {number for v in kept for number in self._entries[v].builds_on}
        self._entries = {v: e for v, e in self._entries.items() if v in kept}

    def clear(self, attempt: int = 0) -> None:
        """No version is here any more: the learner goes back, and `attempt` publishes anew."""
        self._check(attempt)
        self._entries.clear()

    def _check(self, attempt: int) -> None:
        if attempt < self._attempt:
            raise FencedError(
                f"attempt {self._attempt} publishes, and this is attempt {attempt}: another learner "
                "took over"
            )
        self._attempt = attempt

    def find(self, version: int) -> Entry | None:
        return self._entries.get(version)

    def sizes(self) -> dict[int, int]:
        """Bytes of the objects of each version that is kept."""
        return {version: entry.num_bytes for version, entry in self._entries.items()}


class ObjectSink:
    """Puts one shard into the object store. Call `stored` after the write."""

    def __init__(self, objects: Shelf) -> None:
        self._objects = objects
        self._data: Handle = None
        self._image: ShardImage

    def write(self, version: int, name: str, image: ShardImage) -> None:
        self._data, self._image = self._objects.put(image.chunks), image

    def stored(self, report: ShardReport) -> StoredShard:
        """The handles of the shard that was written, as `report` describes it."""
        blob = MemoryBlob(report.file, self._image.chunks)
        header = self._image.chunks[0]
        ranges = [(0, 8), (8, len(header) - 8)]
        ranges += border_ranges(report, ShardFile(blob, report.num_bytes))
        edges = [bytearray(length) for _, length in ranges]
        for (position, _), piece in zip(ranges, edges, strict=True):
            blob.read_into(memoryview(piece), position)
        return StoredShard(
            report=report,
            data=self._data,
            edges=self._objects.put(edges),
            positions=tuple(position for position, _ in ranges),
        )


def commit_objects(
    source: ObjectSource,
    root: str | Path,
    version: int,
    shards: Sequence[StoredShard],
    publish: Callable[[Entry], None],
    expected_names: Mapping[str, tuple[int, ...]] | None,
    deadline: Deadline,
    clock: Callable[[], float] = time.time,
) -> WeightVersion:
    """Check what all ranks put, and hand the entry to `publish`, which makes it visible.

    `root` is the file store's, where the version would stand. Raises `WeightError` as `store.commit`,
    `StalledError`.
    """
    reports = [shard.report for shard in shards]
    opens = functools.partial(source.open_edges, version, shards, deadline)
    base = store.base_of(source, version, reports)
    manifest = assemble(opens, version, reports, expected_names, base, clock())
    publish(
        Entry(
            manifest=encode(manifest).encode(),
            digest=manifest.digest,
            builds_on=tuple(link.version for link in manifest.chain),
            num_bytes=manifest.stored_bytes,
            shards={shard.report.file: shard.data for shard in shards},
        )
    )
    return store.describe(version_dir(root, version), manifest)


class ObjectSource:
    """The versions of a directory, and those of the file store in `root`."""

    def __init__(
        self,
        root: str | Path,
        objects: Objects,
        find: Callable[[int], Entry | None],
        timeout_s: float,
    ) -> None:
        """`find` asks the directory; `timeout_s` bounds a fetch that comes without a deadline."""
        self._files = FileSource(root)
        self._objects = objects
        self._find = find
        self._timeout_s = timeout_s

    def where(self, version: int) -> str:
        return self._files.where(version)

    def has(self, version: int) -> bool:
        return self._find(version) is not None or self._files.has(version)

    def manifest(self, version: int) -> bytes:
        entry = self._find(version)
        if entry is not None:
            return entry.manifest
        if self._files.has(version):
            return self._files.manifest(version)
        raise WeightError(
            f"{gone(self.where(version))}. It is in neither the object store nor the file store"
        )

    def open(
        self, version: int, names: Sequence[str], deadline: Deadline | None = None
    ) -> list[Blob]:
        entry = self._find(version)
        if entry is None or any(name not in entry.shards for name in names):
            return self._files.open(version, names, deadline)
        deadline = deadline or Deadline(f"reading version {version}", self._timeout_s)
        try:
            found = self._objects.fetch([entry.shards[name] for name in names], deadline)
        except WeightError as error:
            deadline.left_s()  # raises when it was cancelled: then nobody wants the files either
            if self._files.has(version):
                return self._files.open(version, names, deadline)
            raise WeightError(
                f"{self.where(version)}: its shards in the object store are lost, and it is not "
                f"among the versions written to files: {error}"
            ) from error
        where = f"{self.where(version)}/"
        return [
            MemoryBlob(f"{where}{name} (in the object store)", chunks)
            for name, chunks in zip(names, found, strict=True)
        ]

    def open_edges(
        self, version: int, shards: Sequence[StoredShard], deadline: Deadline, names: Sequence[str]
    ) -> list[Blob]:
        """The edges of the shards `names`: all that the commit of `version` reads."""
        by_name = {shard.report.file: shard for shard in shards}
        chosen = [by_name[name] for name in names]
        found = self._objects.fetch([shard.edges for shard in chosen], deadline)
        return [
            EdgeBlob(
                f"{self.where(version)}/{shard.report.file} (in the object store)",
                shard.report.num_bytes,
                dict(zip(shard.positions, pieces, strict=False)),
            )
            for shard, pieces in zip(chosen, found, strict=True)
        ]


class MemoryBlob:
    """Chunks of memory, one after the other, as the bytes of a shard."""

    def __init__(self, where: str, chunks: Sequence[_Bytes]) -> None:
        self.where = where
        self._chunks = [memoryview(chunk) for chunk in chunks]
        *self._starts, self.num_bytes = accumulate((len(c) for c in self._chunks), initial=0)

    def read_into(self, target: memoryview, position: int) -> None:
        if position + len(target) > self.num_bytes:
            raise WeightError(
                f"{self.where}: ends at byte {self.num_bytes}, expected {len(target)} bytes from "
                f"{position} on; it is truncated"
            )
        done, index = 0, bisect_right(self._starts, position) - 1
        while done < len(target):
            chunk, begin = self._chunks[index], position + done - self._starts[index]
            part = chunk[begin : begin + len(target) - done]
            target[done : done + len(part)] = part
            done, index = done + len(part), index + 1

    def close(self) -> None:
        self._chunks = []


class EdgeBlob:
    """A shard of which only some `pieces`, by position, can be read."""

    def __init__(self, where: str, num_bytes: int, pieces: Mapping[int, _Bytes]) -> None:
        self.where = where
        self.num_bytes = num_bytes
        self._pieces = pieces

    def read_into(self, target: memoryview, position: int) -> None:
        piece = self._pieces.get(position, b"")
        if len(piece) != len(target):
            raise WeightError(
                f"{self.where}: has {len(piece)} bytes for the commit at {position}, expected "
                f"{len(target)}. Publish the version again"
            )
        target[:] = memoryview(piece)

    def close(self) -> None:
        self._pieces = {}
