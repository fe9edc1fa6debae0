"""Publishing by learner ranks, and the actors that it needs in the cluster.

A version is a set of files of the weight store. With the relay, readers take these files from each
other and from the ranks' memory. They read the storage only if no other process has a file
(`node_mirrors`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from actors.weights.node_mirrors import RemotePlanner, lender_of, serving_relay
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.waiting import callee_deadline
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.store import commit
from rlhf_cluster.weights.transports.lent_shards import ShardLender
from rlhf_cluster.weights.transports.shared_files import MANIFEST_NAME, FileSink, FileSource
from rlhf_cluster.weights.transports.transport import Deadline, ShardImage, ShardSink
from rlhf_cluster.weights.writer_fence import Writer

log = logging.getLogger(__name__)


class WritesSnapshots(Protocol):
    """Port to a learner rank that can write its last snapshot."""

    def write_snapshot(self, to: Sequence[ShardSink], base: int | None) -> ShardReport:
        """Send the last snapshot to all sinks, as a difference to version `base` unless it is None.

        Raises `WeightError`, `StalledError`.
        """
        ...


class Transport:
    """Publishing to the weight store and the relay.

    Each learner rank calls `write`, rank 0 then `commit`. The driver runs the run inside `serving`.
    """

    def __init__(
        self,
        config: RunConfig,
        lends: Callable[[RunConfig], ShardLender | None] = lender_of,
        planner: Callable[[str], RemotePlanner] = RemotePlanner,
    ) -> None:
        """`lends`: builds the lender of this process's shards; None if the run has no relay.

        `planner`: builds the handle of the run's planner, from the run's name.
        """
        self._lends, self._planner = lends, planner
        self._config = config
        self._root = str(config.weights_dir)
        self._keep = config.staleness.oldest_in_flight + 2
        self._starting = threading.Lock()
        self._lent: ShardLender | None = None

    def write(
        self, rank: WritesSnapshots, base: int | None, deadline: Deadline, writer: Writer
    ) -> ShardReport:
        """Write the rank's share of its snapshot, and lend it to the relay.

        Raises `WeightError`, `StalledError`.
        """
        sinks: list[ShardSink] = [FileSink(self._root, deadline=deadline, attempt=writer.attempt)]
        lender = self._lender()
        if lender is not None:
            lending = _end_before(deadline)
            lender.withdraw(lending)
            sinks.append(lender.sink(lending))
        return rank.write_snapshot(sinks, base)

    def commit(
        self,
        version: int,
        shards: Sequence[ShardReport],
        expected_names: Mapping[str, tuple[int, ...]],
        deadline: Deadline,
        writer: Writer,
    ) -> WeightVersion:
        """Check the shards of all ranks and make the version visible.

        Raises `WeightError`, `StalledError`; `FencedError` if a later attempt than `writer` has begun.
        """
        left_s = deadline.left_s("the commit")
        published = commit(
            self._root,
            version,
            shards,
            self._keep,
            expected_names,
            lock_timeout_s=left_s,
            writer=writer,
        )
        lender = self._lender()
        if lender is not None:
            # The version is visible, and readers can get the manifest elsewhere.
            with contextlib.suppress(WeightError, StalledError):
                manifest = memoryview(FileSource(self._root).manifest(version))
                image = ShardImage(chunks=(manifest,))
                lender.lend(version, MANIFEST_NAME, image, _end_before(deadline))
        return published

    def begin_anew(self) -> None:
        """Reset the relay after a failure of the learner, whose successor repeats version numbers.

        The versions in files have been rewound before. If the planner cannot be reached, as when it was
        on the learner's node, the run continues: Ray restarts the planner empty, or readers are sent to
        files that they verify and refuse.
        """
        if not self._config.weights.is_relayed:
            return
        try:
            self._planner(self._config.run.name).begin_anew()
        except WeightError as error:
            log.warning(
                "the relay may send readers to files of the learner that was lost: %s", error
            )

    def serving(self) -> AbstractAsyncContextManager[None]:
        """Return a context inside which the cluster has the actors that the transport needs."""
        return serving_relay(self._config) if self._config.weights.is_relayed else nullcontext()

    def _lender(self) -> ShardLender | None:
        """Return the lender of this process, started by the first write; None if there is none.

        If the process cannot serve, the relay has one source less, and the version is not affected.
        The next version tries again.
        """
        with self._starting:
            try:
                self._lent = self._lent or self._lends(self._config)
            except (OSError, RuntimeError) as error:  # no file descriptor or no thread is left
                log.warning("this rank lends nothing to the relay: %s", error)
            return self._lent


def _end_before(publishing: Deadline) -> Deadline:
    """Return the deadline of the relay's part of a publish, before that of the publish itself."""
    return Deadline("lending a shard", callee_deadline(publishing.left_s("the relay")))
