"""Ports of a mirror to its process: a folder, threads, time, the storage and the other nodes.

`node_mirror.Mirror` decides, and the ports act. In a worker's process they are files, threads and
sockets (`mirror_folder.NodeCopies`, `mirror_carrier.ThreadCarrier`). These wait in the thread that
calls them, and their coroutines never suspend. In a simulated process the ports wait on an event
loop in virtual time.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Any, Protocol, TypeVar

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.relay_plan import Assignment, Piece
from rlhf_cluster.weights.transports.transport import Deadline

_T = TypeVar("_T")


class NoProgress(WeightError):
    """A read of the storage returned nothing for too long: it may hang for ever."""


class Planner(Protocol):
    """`RelayPlan` of this or another process. Raises `WeightError` when it cannot be reached."""

    def exchange(
        self,
        node: str,
        wanted: Sequence[Piece],
        done: Sequence[tuple[Piece, Any]],
        failed: Sequence[tuple[Piece, str | None]],
    ) -> Assignment | None: ...

    def keeps(self, node: str, versions: Sequence[int]) -> None: ...


class Part(Protocol):
    """A file that is being received. It has its final name from `keep` on."""

    @property
    def num_bytes(self) -> int: ...

    def keep(self) -> None: ...


class Copies(Protocol):
    """The copies of this node, for all its readers. Raises `OSError` where they cannot be kept."""

    @property
    def where(self) -> str:
        """Name of the copies in errors."""
        ...

    def path(self, version: int) -> str:
        """Return the path at which readers find a version whose files are all copied."""
        ...

    def turn(self, deadline: Deadline) -> AbstractAsyncContextManager[None]:
        """Exclude the other readers of this node from fetching inside the block.

        From then on the copies are in use until `leave`. Raises `StalledError`.
        """
        ...

    def has(self, piece: Piece) -> bool: ...

    def read(self, piece: Piece) -> bytes: ...

    def identity(self, piece: Piece) -> object | None:
        """Return the identity of the file of `piece`; a file that replaces it has another.

        None: the file does not exist.
        """
        ...

    def part(self, piece: Piece) -> AbstractContextManager[Any]:
        """Return a new `Part`, which is deleted at the end of the block unless it was kept."""
        ...

    def mapped(self, piece: Piece) -> tuple[Any, object]:
        """Return the memory of a copied file, and its identity.

        The memory stays valid while a reference to it exists, also after the file's removal.
        """
        ...

    def versions(self) -> list[int]:
        """Return the numbers of the versions of which at least one file is copied."""
        ...

    def remove(self, version: int) -> None: ...

    def remove_parts(self) -> None:
        """Remove the unfinished files of readers that died or timed out."""
        ...

    def free_bytes(self) -> int: ...

    def leave(self) -> None:
        """Remove the copies where this was the node's last reader."""
        ...


class Carrier(Protocol):
    """All actions of a mirror that take time."""

    @property
    def clock(self) -> Callable[[], float]: ...

    def where(self, version: int) -> str:
        """Return the name of a version in the storage, for errors."""
        ...

    async def sleep(self, seconds: float) -> None: ...

    async def ask(self, call: Callable[..., _T], *arguments: Any) -> _T:
        """Call the planner."""
        ...

    def lock(self) -> AbstractAsyncContextManager[Any]: ...

    async def all_of(
        self,
        work: Callable[[], Coroutine[Any, Any, None]],
        count: int,
        deadline: Deadline,
        waits_for: str,
        end: Callable[[], None],
    ) -> None:
        """Run `work` `count` times concurrently. Raises the first error, or that of `deadline`.

        Work that hangs does not delay the error of `deadline`. `end` is called as soon as this call
        does not wait for the works any more.
        """
        ...

    async def from_storage(
        self, piece: Piece, part: Any, progress_s: float, left_s: Callable[[], float]
    ) -> None:
        """Fill `part` with the piece from the storage.

        `left_s` returns the seconds left, or raises when the piece is not wanted any more. Raises
        `NoProgress` when nothing arrives for `progress_s`; `WeightError`: the piece cannot be read;
        `OSError`: the copy cannot be written.
        """
        ...

    async def from_node(self, address: Any, part: Any, lease: Deadline) -> None:
        """Fill `part` from the node that lends it at `address`. Raises `WeightError`, `OSError`."""
        ...

    def lend(self, data: Any) -> Any:
        """Serve this memory to other nodes until `drop` of the handle's `key`. Return the handle."""
        ...

    def drop(self, keys: Sequence[int]) -> None: ...

    def close(self) -> None: ...
