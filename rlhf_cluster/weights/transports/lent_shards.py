"""A learner rank's newest shard, lent from its memory to the first nodes of the relay.

    rank   ShardLender.withdraw -> FileSink.write -> ShardLender.write     during the next step
    node   the plan sends it here, and later to the nodes that have the file

The files in the storage are the version: they are written first, and a reader that gets nothing here
reads them. So a failure here costs the relay a source, and does not affect the version.

Promises:
- Readers fetch no file from the storage of a version that all ranks lend.
- A rank holds one shard in addition to its weights. The shard before is freed first, except while a
  reader is fetching it.
- The plan sends no reader to a shard that is about to be freed.
- The lent shard is a copy that never changes, and readers verify it as they do files.
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
    """`RelayPlan` of this or another process. Raises `WeightError` when it cannot be reached."""

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]]) -> None: ...


class ShardLender:
    """`ShardSink` of one process that lends copies of the shards. Several threads may call it."""

    def __init__(
        self,
        node: str,
        planner: Lists,
        server: ShardServer,
        copy: Callable[[memoryview], memoryview] | None = None,
        told: Callable[[str], None] = log.warning,
    ) -> None:
        """Lend nothing yet.

        Args:
            node: the name of this process among all that serve files.
            copy: returns a copy of a chunk.
            told: gets the message when a shard cannot be lent.
        """
        self._node, self._planner, self._server = node, planner, server
        self._copy, self._told = copy or _copy, told
        self._lock = threading.Lock()
        self._lent: dict[Piece, Served] = {}

    def withdraw(self) -> None:
        """Make the plan send no reader here, until the next `write`.

        Call before the next version is written.
        """
        self._list([])

    def write(self, version: int, name: str, image: ShardImage) -> None:
        """Lend `image`, and keep only shards of the same version lent."""
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


def _copy(chunk: memoryview) -> memoryview:
    # numpy releases the GIL while it copies, so that the learner's step runs meanwhile.
    return np.frombuffer(chunk, dtype=np.uint8).copy().data
