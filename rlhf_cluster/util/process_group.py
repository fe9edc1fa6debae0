"""Process group of the learner ranks: rendezvous store, joining, deadlines.

The ranks meet at a store. Its socket listens before its address is published, since another process
could take a port that is chosen first and opened later.
"""

from __future__ import annotations

import datetime
import socket
import time
from urllib.parse import urlparse

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlhf_cluster.errors import ConfigError, StalledError

Store = dist.Store  # pyright: ignore[reportPrivateImportUsage]
HashStore = dist.HashStore  # pyright: ignore[reportPrivateImportUsage]
TCPStore = dist.TCPStore  # pyright: ignore[reportPrivateImportUsage]


def serve_store(listener: socket.socket) -> TCPStore:
    """Serve a store for the ranks of one group on `listener`, for as long as the returned object lives.

    The store takes over the socket. Ranks that connect earlier wait in the socket's queue.
    """
    host, port = listener.getsockname()[:2]
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def join_group(
    init_method: str | None,
    rank: int,
    world_size: int,
    device_type: str,
    start_timeout_s: float,
    collective_timeout_s: float,
) -> DeviceMesh:
    """Meet the other ranks and build the data-parallel mesh.

    `init_method` is tcp://host:port of `serve_store`; None for a group of one. Ranks may take
    different times to load: only `start_timeout_s` bounds the wait for all of them. After that every
    collective has `collective_timeout_s`.

    Raises:
        ConfigError: an address that is not tcp://host:port, or none for several ranks.
        StalledError: no store, or ranks that did not come in time; the message names them.

    Waits for: the store, then all ranks. Unblocked by: the last rank, or `start_timeout_s` for both.
    """
    ends = time.monotonic() + start_timeout_s
    store = _store(init_method, world_size, start_timeout_s)
    try:
        _wait_for_all(store, rank, world_size, max(0.1, ends - time.monotonic()))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=datetime.timedelta(seconds=collective_timeout_s),
        )
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("data",))
    except RuntimeError as error:
        raise StalledError(
            f"learner rank {rank}: the group of {world_size} ranks did not form at {init_method} "
            f"within {start_timeout_s:g} s ({error}). Look for a rank that did not start, or raise "
            "run.start_timeout_s"
        ) from error


def _store(init_method: str | None, world_size: int, timeout_s: float) -> Store:
    if init_method is None and world_size == 1:
        return HashStore()
    address = urlparse(init_method or "")
    if address.scheme != "tcp" or address.hostname is None or address.port is None:
        raise ConfigError(f"init_method = {init_method!r}: expected tcp://host:port")
    timeout = datetime.timedelta(seconds=timeout_s)
    try:
        return TCPStore(
            address.hostname, address.port, None, False, timeout=timeout, wait_for_workers=False
        )
    except RuntimeError as error:
        raise StalledError(
            f"learner ranks: nothing answers at {init_method} within {timeout_s:g} s ({error}). Rank 0 "
            "serves it: look for its error"
        ) from error


def _wait_for_all(store: Store, rank: int, world_size: int, timeout_s: float) -> None:
    """Report this rank in the store, and wait until every rank has done so."""
    store.set(f"rank {rank}", "came")
    try:
        store.wait([f"rank {r}" for r in range(world_size)], datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [r for r in range(world_size) if not store.check([f"rank {r}"])]
        raise StalledError(
            f"learner rank {rank}: the group of {world_size} ranks did not form within {timeout_s:g} "
            f"s: ranks {missing} did not come. Look for their errors, or raise run.start_timeout_s"
        ) from error
