"""How a learner rank publishes, and what the run needs in the cluster for it.

A version is files of the weight store. With the relay its readers take these from each other and from
the ranks' memory, and read the storage only where nobody else has a file (`node_mirrors`).
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from actors.weights.node_mirrors import (
    RemotePlanner,
    lender_of,
    serving_relay,
)
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.store import commit
from rlhf_cluster.weights.transports.lent_shards import ShardLender
from rlhf_cluster.weights.transports.shared_files import (
    MANIFEST_NAME,
    FileSink,
    FileSource,
)
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardImage,
    ShardSink,
)
from rlhf_cluster.weights.writer_fence import Writer

log = logging.getLogger(__name__)


class WritesSnapshots(Protocol):
    """Learner rank, as a transport sees it."""

    def write_snapshot(self, to: Sequence[ShardSink], base: int | None) -> ShardReport:
        """Send the last snapshot to all sinks, as a difference to the version `base` if one is given.

        Raises `WeightError`, `StalledError`.
        """
        ...


class Transport:
    """A learner rank calls `write`, rank 0 `commit`; the driver holds the run inside `serving`."""

    def __init__(
        self,
        config: RunConfig,
        lends: Callable[[RunConfig], ShardLender | None] = lender_of,
        planner: Callable[[str], RemotePlanner] = RemotePlanner,
    ) -> None:
        """`lends` begins to serve the shards of this process, where the run has the relay; `planner`
        makes the caller of that run's planner."""
        self._lends, self._planner = lends, planner
        self._config = config
        self._root = str(config.weights_dir)
        self._keep = config.staleness.oldest_in_flight + 2
        self._starting = threading.Lock()
        self._lent: ShardLender | None = None

    def write(
        self, rank: WritesSnapshots, base: int | None, deadline: Deadline, writer: Writer
    ) -> ShardReport:
        """Write the rank's share of its snapshot, and lend it to the relay. Raises `WeightError`,
        `StalledError`."""
        sinks: list[ShardSink] = [FileSink(self._root, deadline=deadline, attempt=writer.attempt)]
        lender = self._lender()
        if lender is not None:
            lender.withdraw()
            sinks.append(lender)
        return rank.write_snapshot(sinks, base)

    def commit(
        self,
        version: int,
        shards: Sequence[ShardReport],
        expected_names: Mapping[str, tuple[int, ...]],
        deadline: Deadline,
        writer: Writer,
    ) -> WeightVersion:
        """Check what all ranks wrote and make it visible. Raises `WeightError`, `StalledError`;
        `FencedError` when a later attempt than `writer` has begun."""
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
            with contextlib.suppress(
                WeightError
            ):  # the version is visible, and readers try as well
                manifest = memoryview(FileSource(self._root).manifest(version))
                lender.write(version, MANIFEST_NAME, ShardImage(chunks=(manifest,)))
        return published

    def begin_anew(self) -> None:
        """The learner that published is gone, and its successor publishes from an earlier version on;
        the versions in files are rewound already.

        A planner that cannot be asked, as when its node went with the learner's, costs the relay and
        not the run: it comes back empty, or sends readers to files that they verify and refuse.
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
        """What the transport needs in the cluster is there inside the block."""
        return serving_relay(self._config) if self._config.weights.is_relayed else nullcontext()

    def _lender(self) -> ShardLender | None:
        """Of this process, which lends from the first write on. A process that cannot serve costs the
        relay a source, and the version nothing; it tries again with the next one."""
        with self._starting:
            try:
                self._lent = self._lent or self._lends(self._config)
            except (OSError, RuntimeError) as error:  # no file descriptor or no thread is left
                log.warning("this rank lends nothing to the relay: %s", error)
            return self._lent
