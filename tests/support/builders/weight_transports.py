"""One store of weights per transport, with handles on the bytes that it carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.read_version import Held
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.transports.rank_memory import (
    PeerObjects,
    ShardServer,
)
from rlhf_cluster.weights.transports.shared_files import (
    FileSource,
    partial_dir,
)
from rlhf_cluster.weights.transports.shared_memory import (
    Directory,
    ObjectSink,
    ObjectSource,
    StoredShard,
    commit_objects,
)
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardSink,
)
from tests.support.builders.small_weights import (
    Base,
    Tensors,
    publish,
    shard_bases,
    split_evenly,
    write,
)


class FileStand:
    """Versions as files below `root`. Shards are paths."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source = FileSource(root)

    def write(self, version: int, tensors: Tensors, num_ranks: int = 2, base: Any = None) -> Any:
        """The shards of a version that is not committed yet, and what `commit` takes."""
        reports = write(self.root, version, tensors, num_ranks, base)
        return [partial_dir(self.root, version) / report.file for report in reports], reports

    def commit(self, version: int, reports: Any, keep: int = 10) -> WeightVersion:
        return store.commit(self.root, version, reports, keep)

    def publish(
        self,
        version: int,
        tensors: Tensors,
        num_ranks: int = 2,
        keep: int = 10,
        base: Base | None = None,
    ) -> WeightVersion:
        return publish(self.root, version, tensors, num_ranks, keep, base)

    def shards(self, version: WeightVersion) -> list[Path]:
        return sorted(Path(version.path).glob("*.safetensors"))

    def load(self, shard: Path) -> bytearray:
        return bytearray(shard.read_bytes())

    def store(self, shard: Path, data: bytes | bytearray) -> None:
        shard.write_bytes(data)

    def lose(self, shard: Path) -> None:
        shard.unlink()

    def read(
        self, version: WeightVersion, held: Held | None = None, verify: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return store.read(version.path, verify, version.digest, held, self.source)

    def find(self) -> list[int]:
        return store.versions(self.root)


class MemoryObjects:
    """`Objects` in a dictionary. Counts what is fetched."""

    def __init__(self) -> None:
        self.held: dict[int, list[bytes]] = {}
        self.fetched: list[int] = []
        self._next = 0

    def put(self, chunks: Sequence[Any]) -> Any:
        self._next += 1
        self.held[self._next] = [bytes(chunk) for chunk in chunks]
        return self._next

    def fetch(self, handles: Sequence[int], deadline: Deadline) -> list[list[bytes]]:
        deadline.left_s("objects")
        self.fetched += handles
        for handle in handles:
            if handle not in self.held:
                raise WeightError(f"object {handle} is lost")
        return [self.held[handle] for handle in handles]


class ObjectStand:
    """Versions as objects, known by a directory. Shards are (handle, file name)."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.objects = MemoryObjects()
        self.directory = Directory()
        self.source = ObjectSource(root, self.objects, self.directory.find, 10.0)

    def write(
        self,
        version: int,
        tensors: Tensors,
        num_ranks: int = 2,
        base: Base | None = None,
        durable: bool = False,
    ) -> tuple[list[Any], list[StoredShard]]:
        from rlhf_cluster.weights.transports.shared_files import FileSink

        bases = shard_bases(base, num_ranks)
        stored = []
        for rank, parts in enumerate(split_evenly(tensors, num_ranks)):
            sink = ObjectSink(self.objects)
            files: list[ShardSink] = [FileSink(self.root)] if durable else []
            stored.append(
                sink.stored(send_shard([*files, sink], version, rank, parts, bases[rank]))
            )
        # A commit reads edges: what is damaged before it is damaged there.
        return [(shard.edges, shard.report.file) for shard in stored], stored

    def commit(self, version: int, shards: Any, keep: int = 10) -> WeightVersion:
        return commit_objects(
            self.source,
            self.root,
            version,
            shards,
            lambda entry: self.directory.publish(version, entry, keep),
            None,
            Deadline("the commit", 10.0),
        )

    def publish(
        self,
        version: int,
        tensors: Tensors,
        num_ranks: int = 2,
        keep: int = 10,
        base: Base | None = None,
        durable: bool = False,
    ) -> WeightVersion:
        _, stored = self.write(version, tensors, num_ranks, base, durable)
        if durable:
            store.commit(self.root, version, [shard.report for shard in stored], keep)
        return self.commit(version, stored, keep)

    def shards(self, version: WeightVersion) -> list[tuple[int, str]]:
        entry = self.directory.find(version.version)
        assert entry is not None
        return [(handle, name) for name, handle in sorted(entry.shards.items())]

    def load(self, shard: tuple[int, str]) -> bytearray:
        return bytearray(b"".join(self.objects.held[shard[0]]))

    def store(self, shard: tuple[int, str], data: bytes | bytearray) -> None:
        sizes = [len(chunk) for chunk in self.objects.held[shard[0]]]
        chunks, start = [], 0
        for size in sizes:
            chunks.append(bytes(data[start : start + size]))
            start += size
        rest = bytes(data[start:])
        self.objects.held[shard[0]] = [*chunks, rest] if rest else chunks

    def lose(self, shard: tuple[int, str]) -> None:
        del self.objects.held[shard[0]]

    def read(
        self, version: WeightVersion, held: Held | None = None, verify: bool = True
    ) -> Iterator[tuple[str, torch.Tensor]]:
        return store.read(version.path, verify, version.digest, held, self.source)

    def find(self) -> list[int]:
        return sorted(self.directory.sizes())


class ServedObjects(MemoryObjects):
    """Objects in the memory of a server, from which a reader takes them over a socket."""

    def __init__(self) -> None:
        super().__init__()
        self._server = ShardServer("learner-0", "127.0.0.1", 30.0, told=self._note)
        self._shelf = self._server.shelf()
        self._reader = PeerObjects("generation-0", "gloo")
        self.held: Any = self._server.held
        self.notes: list[str] = []

    def _note(self, text: str) -> None:
        self.notes.append(text)

    def put(self, chunks: Sequence[Any]) -> Any:
        return self._shelf.put(chunks)

    def fetch(self, handles: Sequence[Any], deadline: Deadline) -> list[Any]:
        return self._reader.fetch(handles, deadline)

    def close(self) -> None:
        self._server.close()


class PeerStand(ObjectStand):
    """Versions in the memory of a rank, known by a directory. Shards are (key, file name)."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.objects = ServedObjects()
        self.source = ObjectSource(root, self.objects, self.directory.find, 10.0)

    def write(self, *arguments: Any, **named: Any) -> tuple[list[Any], list[StoredShard]]:
        shards, stored = super().write(*arguments, **named)
        return [(handle.key, name) for handle, name in shards], stored

    def shards(self, version: WeightVersion) -> list[tuple[int, str]]:
        return [(handle.key, name) for handle, name in super().shards(version)]

    def close(self) -> None:
        self.objects.close()


Stand = FileStand | ObjectStand
STANDS = {"files": FileStand, "objects": ObjectStand, "peers": PeerStand}


def flip(stand: Any, shard: Any, position: int) -> None:
    data = stand.load(shard)
    data[position] ^= 0x10
    stand.store(shard, data)


def name_of(shard: Any) -> str:
    return shard.name if isinstance(shard, Path) else shard[1]
