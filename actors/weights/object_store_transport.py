"""Ray's object store as transport of weights: objects of the learner ranks, and one directory actor.

A rank puts its shard on its own node, without a copy in between; a reader on the same node reads it
in place, one on another node gets it from Ray's transfer. Only references pass through the driver.
Ray counts references: an object lives as long as the directory, or a reader, holds one, and the
process that put it lives. When a rank dies its objects are lost, whoever holds references; the
versions that were written to files stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.cluster.named_actors import (
    NamedActor,
    serving,
)
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.store import commit
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.transports.shared_memory import (
    Directory,
    Entry,
    Handle,
    ObjectSink,
    ObjectSource,
    StoredShard,
    commit_objects,
)
from rlhf_cluster.weights.transports.transport import (
    Deadline,
    ShardSink,
)
from rlhf_cluster.weights.writer_fence import Writer

POLL_S = 0.2
"""How soon a wait ends after its deadline was cancelled."""
_CALL_TIMEOUT_S = 30.0


class RayObjects:
    """`Shelf` and `Objects` over `ray.put` and `ray.get`."""

    def put(self, chunks: Sequence[bytes | bytearray | memoryview]) -> Handle:
        # Arrays travel outside the pickle: into the store in one copy, and out of it in none.
        arrays = [np.frombuffer(chunk, dtype=np.uint8) for chunk in chunks]
        try:
            return [ray.put(arrays)]  # in a list, so that calls pass it on and do not fetch it
        except RayError as error:
            raise WeightError(
                f"{sum(a.nbytes for a in arrays)} bytes cannot be put into Ray's object store "
                f"({_line(error)}). Raise cluster.object_store_bytes, or lower the staleness bound"
            ) from error

    def fetch(self, handles: Sequence[Handle], deadline: Deadline) -> list[list[memoryview]]:
        """Waits for: Ray's transfer to this node. Unblocked by: the deadline, its cancel, a loss."""
        references = [reference for [reference] in handles]
        waiting = references
        while waiting:
            left_s = deadline.left_s(f"{len(waiting)} of {len(references)} objects")
            _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(POLL_S, left_s))
        try:
            found = ray.get(references, timeout=deadline.left_s("objects"))
        except GetTimeoutError as error:
            raise StalledError(f"objects did not arrive in time ({_line(error)})") from error
        except RayError as error:
            raise WeightError(_line(error)) from error
        return [[memoryview(array) for array in arrays] for arrays in found]


class _RemoteDirectory(NamedActor):
    """The directory actor of a run, as seen by another process."""

    def __init__(self, run_name: str) -> None:
        super().__init__(directory_name(run_name), "which lists the versions in memory")

    def publish(
        self, version: int, entry: Entry, keep: int, attempt: int, deadline: Deadline
    ) -> None:
        self.call(deadline.left_s("the directory"), "publish", version, entry, keep, attempt)

    def find(self, version: int) -> Entry | None:
        return self.call(_CALL_TIMEOUT_S, "find", version)

    def clear(self, attempt: int) -> None:
        self.call(_CALL_TIMEOUT_S, "clear", attempt)

    def sizes(self) -> dict[int, int]:
        return self.call(_CALL_TIMEOUT_S, "sizes")


class RayTransport:
    """Versions as Ray objects; those that have to last are written to files as well."""

    def __init__(self, config: RunConfig) -> None:
        self._run = config.run.name
        self._root = config.weights_dir
        self._keep = config.staleness.oldest_in_flight + 2
        self._directory = _RemoteDirectory(config.run.name)
        self._objects = RayObjects()
        self._source = ObjectSource(
            self._root, self._objects, self._directory.find, config.generation.pull_timeout_s
        )

    def write(
        self, rank: Any, base: int | None, durable: bool, deadline: Deadline, writer: Writer
    ) -> StoredShard:
        sink = ObjectSink(self._objects)
        sinks = self._files(durable, deadline, writer)
        deadline.left_s()
        report = rank.write_snapshot([*sinks, sink], base)
        return sink.stored(report)

    def commit(
        self,
        version: int,
        shards: Sequence[StoredShard],
        expected_names: Mapping[str, tuple[int, ...]],
        durable: bool,
        deadline: Deadline,
        writer: Writer,
    ) -> WeightVersion:
        if durable:
            reports = [shard.report for shard in shards]
            left_s = deadline.left_s("the commit")
            commit(
                str(self._root),
                version,
                reports,
                self._keep,
                expected_names,
                lock_timeout_s=left_s,
                writer=writer,
            )
        return commit_objects(
            self._source,
            self._root,
            version,
            shards,
            lambda entry: self._directory.publish(
                version, entry, self._keep, writer.attempt, deadline
            ),
            expected_names,
            deadline,
        )

    def source(self) -> ObjectSource:
        return self._source

    def serving(self) -> AbstractAsyncContextManager[None]:
        """The run's directory actor. When it dies it comes back empty, and versions that are not in
        files are lost."""
        return serving(Directory, directory_name(self._run))

    def begin_anew(self, writer: Writer) -> None:
        """Objects die with the rank that put them: what a lost learner published is in files or
        nowhere. Raises `WeightError`."""
        self._directory.clear(writer.attempt)

    def _files(self, durable: bool, deadline: Deadline, writer: Writer) -> list[ShardSink]:
        if not durable:
            return []
        return [FileSink(self._root, deadline=deadline, attempt=writer.attempt)]

    def sizes(self) -> dict[int, int]:
        """Bytes of the objects of each version that is kept."""
        return self._directory.sizes()


def directory_name(run_name: str) -> str:
    return f"weights:{run_name}"


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
