"""Interface of the transports of a version's shards from the learner ranks to its readers.

    rank      encode_shard  -->  ShardSink.write                 during the next step
    rank 0    assemble      -->  manifest, then visible          complete before announced
    reader    ShardSource.manifest, ShardSource.open  -->  Blob.read_into  -->  verified tensors

A transport moves opaque bytes. Their meaning (manifest, hashes, digest, differences) is the same for
all transports: `assemble` checks a version before it is visible, and `read_version` checks each tensor
before it returns it. Sinks are the files of the store, and the memory that a rank lends to the relay.

Promises of every transport:
- A version is found only when all its shards exist.
- All waits end with the deadline, or soon after its `cancel`, which another thread may call.
- A shard that is missing, or cannot be fetched, is a `WeightError` that names it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from rlhf_cluster.errors import StalledError, WeightError


class Deadline:
    """Time limit of a publish or a pull, which another thread may cancel.

    A pickled copy has the same end on the same machine; a `cancel` does not reach it.
    """

    def __init__(
        self, what: str, timeout_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start the time limit. `what` is its name in errors, such as "pull of version 7"."""
        self._what, self._timeout_s, self._clock = what, timeout_s, clock
        self._ends = clock() + timeout_s
        self._cancelled = threading.Event()

    def __getstate__(self) -> tuple[str, float, Callable[[], float], float]:
        return self._what, self._timeout_s, self._clock, self._ends

    def __setstate__(self, state: tuple[str, float, Callable[[], float], float]) -> None:
        self._what, self._timeout_s, self._clock, self._ends = state
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def left_s(self, waits_for: str = "") -> float:
        """Return the seconds left, more than 0. `waits_for` names in errors what is missing.

        Raises `StalledError` past the end, `WeightError` after `cancel`.
        """
        waiting = f", waiting for {waits_for}" if waits_for else ""
        if self._cancelled.is_set():
            raise WeightError(f"{self._what} was cancelled{waiting}")
        left = self._ends - self._clock()
        if left <= 0:
            raise StalledError(f"{self._what} was not over after {self._timeout_s:g} s{waiting}")
        return left


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardImage:
    """A shard file in memory: its bytes are those of `chunks`, one after the other.

    `chunks[0]` is the header with its length; the others are the memory of the tensors themselves.
    """

    chunks: tuple[memoryview, ...]

    @property
    def num_bytes(self) -> int:
        return sum(len(chunk) for chunk in self.chunks)


class Blob(Protocol):
    """The bytes of one shard file, open for reading."""

    @property
    def where(self) -> str:
        """Name of the file in errors."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def read_into(self, target: memoryview, position: int) -> None:
        """Fill `target` with the bytes at `position`. Raises `WeightError`."""
        ...

    def close(self) -> None: ...


class ShardSink(Protocol):
    """Destination to which a learner rank writes its shard of a version that is not visible yet."""

    def write(self, version: int, name: str, image: ShardImage) -> None:
        """Write the bytes of `image`, which may change after the return, as file `name`.

        Raises `WeightError`: no space, I/O error; `StalledError`.
        """
        ...


class ShardSource(Protocol):
    """Source of versions for a reader. Serves several threads."""

    def where(self, version: int) -> str:
        """Return the name of the version in errors."""
        ...

    def has(self, version: int) -> bool: ...

    def manifest(self, version: int) -> bytes:
        """Return the manifest as JSON. Raises `WeightError` where the version does not exist."""
        ...

    def open(self, version: int, names: Sequence[str], deadline: Deadline | None) -> list[Blob]:
        """Open shard files of a version, in the order of `names`.

        They stay readable when the version is removed meanwhile. Raises `WeightError`, and nothing
        stays open; `StalledError`.
        """
        ...
