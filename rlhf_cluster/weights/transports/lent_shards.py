"""A learner rank's newest shard in its own memory, from where the first nodes of the relay take it.

    rank   ShardLender.withdraw -> FileSink.write -> ShardLender.write     beside the next step
    node   the plan sends it here, and later to the nodes that have the file

The files in the storage stay what a version is: they are written first, and readers who get nothing
here read them. So whatever goes wrong here costs the relay a source, and the version nothing.

Promises:
- the storage gives readers no file of a version that all ranks lend;
- a rank holds one shard beside its own weights: the one before is given back first, except to a reader
  that is taking it;
- nobody is sent to a shard that is about to be given back;
- what is lent is a copy that never changes, and readers verify it as they do files.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.rank_memory import Served, ShardServer
from rlhf_cluster.weights.transports.relay_plan import Piece
from rlhf_cluster.weights.transports.transport import ShardImage

log = logging.getLogger(__name__)


class Lists(Protocol):
    """`RelayPlan`, wherever it is. Raises `WeightError` when it cannot be asked."""

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]]) -> None: ...


class ShardLender:
    """`ShardSink` of one process that copies what it is given. Several threads may call it."""

    def __init__(
        self,
        node: str,
        planner: Lists,
        server: ShardServer,
        copy: Callable[[memoryview], memoryview] | None = None,
        told: Callable[[str], None] = log.warning,
    ) -> None:
        """`node` names this process among all that serve files; `copy` keeps a chunk."""
        self._node, self._planner, self._server = node, planner, server
        self._copy, self._told = copy or _copied, told
        self._lock = threading.Lock()
        self._lent: dict[Piece, Served] = {}

    def withdraw(self) -> None:
        """Call before the next version is written. Nobody is sent here until it is."""
        self._list([])

    def write(self, version: int, name: str, image: ShardImage) -> None:
        """Lend `image`, and what is lent of the same version, and nothing else."""
        with self._lock:
            self._drop_all_but(version)
            try:
                chunks = [self._copy(chunk) for chunk in image.chunks]
            except MemoryError:
                self._told(
                    f"{self._node} has no memory for the {image.num_bytes} bytes of {name}: readers "
                    f"take version {version} from the storage"
                )
                return
            piece = Piece(version, name)
            replaced = self._lent.get(piece)
            self._lent[piece] = self._server.lend(chunks)
            self._list(list(self._lent.items()))
            if replaced is not None:
                self._server.drop([replaced.key])

    def _drop_all_but(self, version: int) -> None:
        for piece in [piece for piece in self._lent if piece.version != version]:
            self._server.drop([self._lent.pop(piece).key])

    def _list(self, pieces: Sequence[tuple[Piece, Served]]) -> None:
        try:
            self._planner.lends(self._node, pieces)
        except WeightError as error:
            self._told(f"{self._node} lends nothing: {error}")


def _copied(chunk: memoryview) -> memoryview:
    # numpy lets other threads run while it copies, a step of the learner above all.
    return np.frombuffer(chunk, dtype=np.uint8).copy().data
