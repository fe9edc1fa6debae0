"""A learner rank's newest shard, lent from its memory to the first nodes of the relay.

    rank   ShardLender.withdraw -> FileSink.write -> ShardLender.write     during the next step
    node   the plan sends it here, and later to the nodes that have the file

The files in the storage are the version: they are written first, and a reader that gets nothing here
reads them. So a failure here costs the relay a source, and does not affect the version.

Promises:
- Readers fetch no file from the storage of a version that all ranks lend.
- A rank holds one shard in addition to its weights. The shard before is freed first, except while a
  reader is fetching it.
- The plan sends no reader to a shard that is about to be freed, also when a late thread of an earlier
  publish still lends one.
- A planner that hangs takes no time that the publish needs: all waits end with a deadline that is
  before that of the publish, and `withdraw` takes at most `WITHDRAW_SHARE` of it.
- The lent shard is a copy that never changes, and readers verify it as they do files.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.util.waiting import callee_deadline
from rlhf_cluster.weights.transports.rank_memory import Served, ShardServer
from rlhf_cluster.weights.transports.relay_plan import Piece
from rlhf_cluster.weights.transports.transport import Deadline, ShardImage

log = logging.getLogger(__name__)

WITHDRAW_SHARE = 0.1
"""Share of the time left to a publish that `ShardLender.withdraw` may take."""


class Lists(Protocol):
    """`RelayPlan` of this or another process.

    Raises `WeightError` when it cannot be reached, or takes longer than about `timeout_s`.
    """

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]], timeout_s: float) -> None: ...


class ShardLender:
    """Lender of copies of one process's shards. Several threads may call it."""

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
        self._is_listed = False
        """Whether the plan may send readers here."""

    def withdraw(self, deadline: Deadline) -> None:
        """Make the plan send no reader here, until the next shard is lent.

        Call before the next version is written. Waits for: the plan, and another thread that lends a
        shard; at most `WITHDRAW_SHARE` of the time left.
        """
        with self._report_failure():
            share_s = WITHDRAW_SHARE * deadline.left_s("the relay")
            short = Deadline("withdrawing its shards", share_s)
            with self._hold_lock(short):
                self._list([], short)

    def sink(self, deadline: Deadline) -> LendingSink:
        """Return the sink for one version. All its waits end with `deadline`."""
        return LendingSink(self, deadline)

    def lend(self, version: int, name: str, image: ShardImage, deadline: Deadline) -> None:
        """Lend `image`, and keep only shards of the same version lent.

        Waits for: the plan, and another thread that lends a shard. Past `deadline`, nothing is lent.
        """
        with self._report_failure(), self._hold_lock(deadline):
            if self._is_listed and any(piece.version != version for piece in self._lent):
                self._list([], deadline)
            self._drop_all_but(version)
            chunks = []
            try:
                for chunk in image.chunks:
                    deadline.left_s(f"a copy of {name}")
                    chunks.append(self._copy(chunk))
            except MemoryError:
                self._told(
                    f"{self._node} has no memory for the {image.num_bytes} bytes of {name}: readers "
                    f"take version {version} from the storage"
                )
                return
            piece = Piece(version, name)
            replaced = self._lent.get(piece)
            self._lent[piece] = self._server.lend(chunks)
            try:
                self._list(list(self._lent.items()), deadline)
            finally:
                if replaced is not None:
                    self._server.drop([replaced.key])

    def _drop_all_but(self, version: int) -> None:
        for piece in [piece for piece in self._lent if piece.version != version]:
            self._server.drop([self._lent.pop(piece).key])

    def _list(self, pieces: Sequence[tuple[Piece, Served]], deadline: Deadline) -> None:
        left_s = deadline.left_s("the plan of the relay")
        timeout_s = callee_deadline(left_s)
        if not timeout_s:
            raise WeightError(f"{left_s:.1f} s are too little to ask the plan of the relay")
        self._is_listed |= bool(pieces)  # a call that is not answered may still arrive
        self._planner.lends(self._node, pieces, timeout_s)
        self._is_listed = bool(pieces)

    @contextmanager
    def _hold_lock(self, deadline: Deadline) -> Iterator[None]:
        what = "another thread that lends a shard"
        if not self._lock.acquire(timeout=deadline.left_s(what)):
            deadline.left_s(what)
            raise WeightError(f"{self._node}: {what} is still busy")
        try:
            yield
        finally:
            self._lock.release()

    @contextmanager
    def _report_failure(self) -> Iterator[None]:
        """Report a failure, which does not affect the version, instead of raising it."""
        try:
            yield
        except (WeightError, StalledError) as error:
            self._told(f"{self._node} lends nothing: {error}")


@dataclass(frozen=True, slots=True)
class LendingSink:
    """`ShardSink` that lends what it is given."""

    lender: ShardLender
    deadline: Deadline

    def write(self, version: int, name: str, image: ShardImage) -> None:
        self.lender.lend(version, name, image, self.deadline)


def _copy(chunk: memoryview) -> memoryview:
    # numpy releases the GIL while it copies, so that the learner's step runs meanwhile.
    return np.frombuffer(chunk, dtype=np.uint8).copy().data
