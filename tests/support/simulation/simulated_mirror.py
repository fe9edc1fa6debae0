"""The ports of `node_mirror.Mirror` in a simulated process: files in a table, bytes over links.

What a node holds in memory is counted as a kernel counts it: a file stays as long as it has a name,
is coming, or is mapped by a process that lives.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.util.tensor_hashing import combine_hashes
from rlhf_cluster.weights.manifest import FileEntry, Manifest, Part, TensorEntry, encode
from rlhf_cluster.weights.transports.mirror_ports import NoProgress
from rlhf_cluster.weights.transports.relay_plan import Piece
from rlhf_cluster.weights.transports.shared_files import MANIFEST_NAME
from rlhf_cluster.weights.transports.transport import Deadline
from tests.support.simulation.simulated_network import Link, Network

T = TypeVar("T")
ROOT = "/weights"
ASK_S = 0.0005  # a call of the planner


@dataclass(eq=False)
class StoredFile:
    num_bytes: float
    content: bytes = b""


@dataclass(eq=False)
class NodeState:
    """What the processes of a node share."""

    name: str
    up: Link
    down: Link
    memory: Link
    room: int
    is_alive: bool = True
    hangs: bool = False
    hangs_reading: bool = False
    """Its reads of the storage give nothing."""
    files: dict[Piece, StoredFile] = field(default_factory=dict)
    parts: set[SimulatedPart] = field(default_factory=set)
    carriers: list[SimulatedCarrier] = field(default_factory=list)
    most_held: float = 0.0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    has_model: bool = False
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def held_bytes(self) -> float:
        lent = (file for carrier in self.carriers for file in carrier.lent.values())
        held = {*self.files.values(), *lent}
        return sum(f.num_bytes for f in held) + sum(part.num_bytes for part in self.parts)

    def look(self) -> None:
        self.most_held = max(self.most_held, self.held_bytes())


@dataclass(eq=False)
class SimulatedPart:
    node: NodeState
    piece: Piece
    file: StoredFile | None = None

    @property
    def num_bytes(self) -> float:
        return 0 if self.file is None else self.file.num_bytes

    def keep(self) -> None:
        assert self.file is not None
        self.node.parts.discard(self)
        self.node.files[self.piece] = self.file
        self.node.look()


class SimulatedCopies:
    """`mirror_ports.Copies` of one process."""

    where = "/dev/shm/mirror"

    def __init__(self, node: NodeState) -> None:
        self._node = node

    def path(self, version: int) -> str:
        return f"{self.where}/{version}"

    @asynccontextmanager
    async def turn(self, deadline: Deadline) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(deadline.left_s(self.where)):
                await self._node.turn.acquire()
        except TimeoutError:
            raise StalledError(
                f"{self.where}: another reader of {self._node.name} holds it"
            ) from None
        try:
            yield
        finally:
            self._node.turn.release()

    def has(self, piece: Piece) -> bool:
        return piece in self._node.files

    def read(self, piece: Piece) -> bytes:
        return self._node.files[piece].content

    def identity(self, piece: Piece) -> object | None:
        return self._node.files.get(piece)

    @contextmanager
    def part(self, piece: Piece) -> Iterator[SimulatedPart]:
        part = SimulatedPart(self._node, piece)
        self._node.parts.add(part)
        try:
            yield part
        finally:
            self._node.parts.discard(part)

    def mapped(self, piece: Piece) -> tuple[StoredFile, object]:
        file = self._node.files[piece]
        return file, file

    def versions(self) -> list[int]:
        return sorted({piece.version for piece in self._node.files})

    def remove(self, version: int) -> None:
        for piece in [piece for piece in self._node.files if piece.version == version]:
            del self._node.files[piece]

    def remove_parts(self) -> None:
        return None

    def free_bytes(self) -> int:
        return 1 << 60

    def leave(self) -> None:
        return None


@dataclass(frozen=True)
class Lent:
    """The address of a file that a process lends."""

    carrier: SimulatedCarrier
    key: int


@dataclass(eq=False)
class Storage:
    """What all nodes share: storage, network and planner, which serves one call at a time."""

    network: Network
    out: Link
    into: Link
    stream: float
    clock: Callable[[], float]
    files: dict[Piece, StoredFile] = field(default_factory=dict)
    planner: asyncio.Lock = field(default_factory=asyncio.Lock)
    given: float = 0.0
    """Bytes of files that were read, also in vain."""

    def publish(self, manifest: Manifest) -> None:
        text = encode(manifest).encode()
        self.files[Piece(manifest.version, MANIFEST_NAME)] = StoredFile(len(text), text)
        for name, entry in manifest.files.items():
            self.files[Piece(manifest.version, name)] = StoredFile(entry.num_bytes)


class SimulatedCarrier:
    """`mirror_ports.Carrier` of one process. `spawn` begins work that ends with the process."""

    def __init__(
        self,
        node: NodeState,
        storage: Storage,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._node, self._storage, self._spawn = node, storage, spawn
        self.clock = storage.clock
        self.lent: dict[int, StoredFile] = {}
        self.is_alive = True
        self._keys = itertools.count(1)
        node.carriers.append(self)

    def where(self, version: int) -> str:
        return f"{ROOT}/v{version}"

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    async def ask(self, call: Callable[..., T], *arguments: Any) -> T:
        async with self._storage.planner:
            await asyncio.sleep(ASK_S)
            return call(*arguments)

    def lock(self) -> AbstractAsyncContextManager[Any]:
        return asyncio.Lock()

    async def all_of(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        count: int,
        deadline: Deadline,
        waits_for: str,
        end: Callable[[], None],
    ) -> None:
        waiting = {self._spawn(work()) for _ in range(count)}
        try:
            while waiting:
                done, waiting = await asyncio.wait(
                    waiting,
                    timeout=deadline.left_s(waits_for),
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    task.result()
        finally:
            end()

    async def from_storage(
        self, piece: Piece, part: SimulatedPart, progress_s: float, left_s: Callable[[], float]
    ) -> None:
        file = self._storage.files.get(piece)
        if file is None:
            raise WeightError(f"{piece}: there is no such version")
        self._storage.given += file.num_bytes
        links = [self._storage.out, self._node.down, Link(self._storage.stream)]
        if self._node.hangs_reading:
            links = [Link(0.0)]
        whole = await self._within(left_s(), file.num_bytes, links, progress_s)
        left_s()
        if not whole:
            raise NoProgress(f"{piece}: nothing was read for {progress_s:g} s")
        part.file = file

    async def from_node(self, address: Lent, part: SimulatedPart, lease: Deadline) -> None:
        source = address.carrier
        where = source._node
        if where.is_alive and not source.is_alive:
            raise WeightError(f"{where.name} listens no more")
        links = [where.up, self._node.down, Link(self._storage.stream)]
        file = source.lent.get(address.key)
        if file is None and where.is_alive:
            raise WeightError(f"{where.name} holds it no more")
        num_bytes = 1.0 if file is None else file.num_bytes
        await self._within(lease.left_s(), num_bytes, links, None)
        lease.left_s()
        if file is None or not source.is_alive:
            raise WeightError(f"{where.name} was lost")
        part.file = file

    async def _within(
        self, seconds: float, num_bytes: float, links: Iterable[Link], progress_s: float | None
    ) -> bool:
        try:
            async with asyncio.timeout(seconds):
                return await self._storage.network.move(num_bytes, *links, progress_s=progress_s)
        except TimeoutError:
            raise StalledError(f"{self._node.name}: {num_bytes:g} bytes are late") from None

    def lend(self, data: StoredFile) -> Lent:
        key = next(self._keys)
        self.lent[key] = data
        self._node.look()
        return Lent(self, key)

    def drop(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.lent.pop(key, None)

    def close(self) -> None:
        """The process is gone, with what it mapped."""
        self.is_alive = False
        self.lent.clear()
        self._node.carriers.remove(self)


def manifest_of(version: int, num_files: int, num_bytes: float) -> Manifest:
    """A version of `num_files` equal files, with the digest of its number."""
    size = int(num_bytes / num_files)
    names = [f"shard-{n}.safetensors" for n in range(num_files)]
    parts = tuple(Part(file=name, offset=n, numel=1) for n, name in enumerate(names))
    entry = TensorEntry(dtype="int8", shape=(num_files,), hash=f"{version:032x}", parts=parts)
    return Manifest(
        version=version,
        created_s=0.0,
        digest=combine_hashes({"weight": entry.hash}),
        files={name: FileEntry(num_bytes=size, header_hash=32 * "0") for name in names},
        tensors={"weight": entry},
    )
