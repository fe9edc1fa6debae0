"""What a mirror needs of its process: a folder, threads, time, the storage and the other nodes.

`node_mirror.Mirror` decides, and these do. In a worker's process they are files, threads and sockets
(`mirror_folder.NodeCopies`, `mirror_carrier.ThreadCarrier`): they wait in the thread that calls
them, and no `await` of theirs suspends. In a simulated process they wait on an event loop in virtual
time.
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
    """A read of the storage from which nothing has come for too long: it may hang for ever."""


class Planner(Protocol):
    """`RelayPlan`, wherever it is. Raises `WeightError` when it cannot be asked."""

    def exchange(
        self,
        node: str,
        wanted: Sequence[Piece],
        done: Sequence[tuple[Piece, Any]],
        failed: Sequence[tuple[Piece, str | None]],
    ) -> Assignment | None: ...

    def keeps(self, node: str, versions: Sequence[int]) -> None: ...


class Part(Protocol):
    """A file that is coming. It has its name from `keep` on."""

    @property
    def num_bytes(self) -> int: ...

    def keep(self) -> None: ...


class Copies(Protocol):
    """The copies of this node, for all its readers. Raises `OSError` where they cannot be kept."""

    @property
    def where(self) -> str:
        """What errors call it."""
        ...

    def path(self, version: int) -> str:
        """Where readers find a version that is here."""
        ...

    def turn(self, deadline: Deadline) -> AbstractAsyncContextManager[None]:
        """No other reader of this node brings anything inside the block; the copies are in use from
        then on until `leave`. Raises `StalledError`."""
        ...

    def has(self, piece: Piece) -> bool: ...

    def read(self, piece: Piece) -> bytes: ...

    def identity(self, piece: Piece) -> object | None:
        """Which file has the name of `piece`, to tell it from one that replaces it; None: none."""
        ...

    def part(self, piece: Piece) -> AbstractContextManager[Any]:
        """A `Part`, gone after the block unless it is kept."""
        ...

    def mapped(self, piece: Piece) -> tuple[Any, object]:
        """The memory of a file that is here, which stays while somebody has it, and its identity."""
        ...

    def versions(self) -> list[int]:
        """Those of which some file is here."""
        ...

    def remove(self, version: int) -> None: ...

    def remove_parts(self) -> None:
        """Of readers that were lost, or have given up."""
        ...

    def free_bytes(self) -> int: ...

    def leave(self) -> None:
        """Remove the copies where this was the node's last reader."""
        ...


class Carrier(Protocol):
    """Whatever takes time."""

    @property
    def clock(self) -> Callable[[], float]: ...

    def where(self, version: int) -> str:
        """What errors call a version in the storage."""
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
        """`count` times `work`, beside each other. Raises the first error, or that of `deadline`, which
        no work that hangs holds up; `end` is called as soon as nobody waits for them any more."""
        ...

    async def from_storage(
        self, piece: Piece, part: Any, progress_s: float, left_s: Callable[[], float]
    ) -> None:
        """Fill `part`. `left_s` gives the seconds left, or raises when the piece is wanted no more.

        Raises `NoProgress` when nothing comes for `progress_s`; `WeightError`: it cannot be read;
        `OSError`: the copy cannot be written.
        """
        ...

    async def from_node(self, address: Any, part: Any, lease: Deadline) -> None:
        """Fill `part` with what another node lends at `address`. Raises `WeightError`, `OSError`."""
        ...

    def lend(self, data: Any) -> Any:
        """Serve this memory to others until `drop` of the handle's `key`."""
        ...

    def drop(self, keys: Sequence[int]) -> None: ...

    def close(self) -> None: ...
