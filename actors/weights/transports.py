"""How a learner rank publishes, and what the run needs in the cluster for it.

A version is files of the weight store. With the relay its readers take these from each other and from
the ranks' memory, and read the storage only where nobody else has a file (`node_mirrors`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Protocol

from actors.weights.node_mirrors import (
    RemotePlanner,
    serving_relay,
)
from rlhf_cluster.config import RunConfig
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.store import commit
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardSink,
)
from rlhf_cluster.weights.writer_fence import Writer


class WritesSnapshots(Protocol):
    """Learner rank, as a transport sees it."""

    def write_snapshot(self, to: Sequence[ShardSink], base: int | None) -> ShardReport:
        """Send the last snapshot to all sinks, as a difference to the version `base` if one is given.

        Raises `WeightError`, `StalledError`.
        """
        ...


class Transport:
    """A learner rank calls `write`, rank 0 `commit`; the driver holds the run inside `serving`."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._root = str(config.weights_dir)
        self._keep = config.staleness.oldest_in_flight + 2

    def write(
        self, rank: WritesSnapshots, base: int | None, deadline: Deadline, writer: Writer
    ) -> ShardReport:
        """Raises `WeightError`, `StalledError`."""
        sink = FileSink(self._root, deadline=deadline, attempt=writer.attempt)
        return rank.write_snapshot([sink], base)

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
        return commit(
            self._root,
            version,
            shards,
            self._keep,
            expected_names,
            lock_timeout_s=left_s,
            writer=writer,
        )

    def begin_anew(self) -> None:
        """The learner that published is gone, and its successor publishes from an earlier version on;
        the versions in files are rewound already. Raises `WeightError`."""
        if self._config.weights.is_relayed:
            RemotePlanner(self._config.run.name).begin_anew()

    def serving(self) -> AbstractAsyncContextManager[None]:
        """What the transport needs in the cluster is there inside the block."""
        return serving_relay(self._config) if self._config.weights.is_relayed else nullcontext()
