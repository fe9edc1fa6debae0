"""The memory of the learner ranks as transport of weights: each reader takes shards from the ranks.

A rank keeps a copy of its shard and serves it at its node's address, which its handles carry; bytes go
through NCCL between the rank's GPU and the reader's, or through gloo, in a process group of those two.
A reader without a GPU takes them from the socket. The run's directory actor says which versions there
are, as with Ray's object store; objects are lost with their rank, and durable versions are in files.
"""

from __future__ import annotations

import os
import socket
from typing import Any

import ray.util

from actors.weights.object_store_transport import RayTransport
from rlhf_cluster.config import RunConfig
from rlhf_cluster.weights.transports.rank_memory import (
    PeerObjects,
    ShardServer,
)
from rlhf_cluster.weights.transports.shared_memory import (
    ObjectSink,
    ObjectSource,
    StoredShard,
)
from rlhf_cluster.weights.transports.transport import Deadline
from rlhf_cluster.weights.writer_fence import Writer


class PeerTransport(RayTransport):
    """Versions in the ranks' memory; those that have to last are written to files as well."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self._timeout_s = config.generation.pull_timeout_s
        self._server: ShardServer | None = None
        reader = f"process {os.getpid()} of {socket.gethostname()}"
        peers = PeerObjects(reader, config.weights.transport, own=lambda: self._server)
        self._source = ObjectSource(self._root, peers, self._directory.find, self._timeout_s)

    def write(
        self, rank: Any, base: int | None, durable: bool, deadline: Deadline, writer: Writer
    ) -> StoredShard:
        if self._server is None:
            host = ray.util.get_node_ip_address()
            self._server = ShardServer(f"learner on {host}", host, self._timeout_s)
        listed = self.sizes()
        deadline.left_s()
        files = self._files(durable, deadline, writer)
        shelf = self._server.shelf()
        try:
            sink = ObjectSink(shelf)
            stored = sink.stored(rank.write_snapshot([*files, sink], base))
        except BaseException:
            self._server.drop(shelf.keys)
            raise
        self._server.keep(stored.report.version, shelf, listed)
        return stored
