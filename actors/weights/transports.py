"""The transports of weights by name: what `weights.transport` chooses from.

A transport is a class with the methods of `Transport` and an entry in `TRANSPORTS`; what its
sinks and sources promise is in `rlhf_cluster.weights.transports.transport`. A learner rank calls
`write`, rank 0 `commit`, every reader reads from `source()`, and the driver holds the run inside
`serving`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Protocol

from actors.weights.node_mirrors import (
    RemotePlanner,
    serving_relay,
)
from actors.weights.object_store_transport import RayTransport
from actors.weights.rank_memory_transport import PeerTransport
from rlhf_cluster.config import RunConfig
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardSink,
    ShardSource,
)
from rlhf_cluster.weights.writer_fence import Writer


class WritesSnapshots(Protocol):
    """Learner rank, as a transport sees it."""

    def write_snapshot(self, to: Sequence[ShardSink], base: int | None) -> ShardReport:
        """Send the last snapshot to all sinks, as a difference to the version `base` if one is given.

        Raises `WeightError`, `StalledError`.
        """
        ...


class Transport(Protocol):
    """What `write` returns goes to `commit` as it is."""

    def write(
        self,
        rank: WritesSnapshots,
        base: int | None,
        durable: bool,
        deadline: Deadline,
        writer: Writer,
    ) -> Any:
        """Bring the rank's snapshot on its way, into files too when it is to be `durable`."""
        ...

    def commit(
        self,
        version: int,
        shards: Sequence[Any],
        expected_names: Mapping[str, tuple[int, ...]],
        durable: bool,
        deadline: Deadline,
        writer: Writer,
    ) -> WeightVersion:
        """Check what all ranks wrote and make it visible. Raises `WeightError`, `StalledError`;
        `FencedError` when a later attempt than `writer` has begun."""
        ...

    def source(self) -> ShardSource | None:
        """Where a process of the run reads versions. None: at their paths."""
        ...

    def begin_anew(self, writer: Writer) -> None:
        """The learner that published is gone, and its successor publishes from an earlier version on;
        the versions in files are rewound already. Raises `WeightError`."""
        ...

    def serving(self) -> AbstractAsyncContextManager[None]:
        """What the transport needs in the cluster is there inside the block."""
        ...


class FileTransport:
    """Every version is files of the weight store."""

    def __init__(self, config: RunConfig) -> None:
        self._root = str(config.weights_dir)
        self._keep = config.staleness.oldest_in_flight + 2
        self._config = config

    def write(
        self,
        rank: WritesSnapshots,
        base: int | None,
        durable: bool,
        deadline: Deadline,
        writer: Writer,
    ) -> ShardReport:
        sink = FileSink(self._root, deadline=deadline, attempt=writer.attempt)
        return rank.write_snapshot([sink], base)

    def commit(
        self,
        version: int,
        shards: Sequence[ShardReport],
        expected_names: Mapping[str, tuple[int, ...]],
        durable: bool,
        deadline: Deadline,
        writer: Writer,
    ) -> WeightVersion:
        from rlhf_cluster.weights.store import commit

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

    def source(self) -> None:
        return None

    def begin_anew(self, writer: Writer) -> None:
        if self._config.weights.mirror is not None:
            RemotePlanner(self._config.run.name).begin_anew()

    def serving(self) -> AbstractAsyncContextManager[None]:
        return serving_relay(self._config) if self._config.weights.mirror else nullcontext()


TRANSPORTS: Mapping[str, type[Transport]] = {
    "files": FileTransport,
    "ray": RayTransport,
    "gloo": PeerTransport,
    "nccl": PeerTransport,
}


def transport_of(config: RunConfig) -> Transport:
    return TRANSPORTS[config.weights.transport](config)  # type: ignore[call-arg]
