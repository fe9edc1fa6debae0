"""The group of learner ranks: where they meet, and how long anyone waits for the others.

The ranks meet at a store, which is served on a socket that listens already when its address is given
out: a port that is looked for first and opened later may be taken in between.
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
    """A store for the ranks of one group, served on `listener` while the object lives.

    Takes the socket over. Ranks may connect before: they wait in the socket's queue.
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

    Waits for the store at `init_method` (tcp://host:port of `serve_store`; None: a group of one) and
    for all ranks to reach it, both within `start_timeout_s`, so that ranks may take unequal time to
    load. After that every collective has `collective_timeout_s`.

    Raises:
        ConfigError: an address that is not tcp://host:port, or none for several ranks.
        StalledError: no store, or not all ranks came; names those that did not.
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
    """Waits until every rank has said that it came."""
    store.set(f"rank {rank}", "came")
    try:
        store.wait([f"rank {r}" for r in range(world_size)], datetime.timedelta(seconds=timeout_s))
    except RuntimeError as error:
        missing = [r for r in range(world_size) if not store.check([f"rank {r}"])]
        raise StalledError(
            f"learner rank {rank}: the group of {world_size} ranks did not form within {timeout_s:g} "
            f"s: ranks {missing} did not come. Look for their errors, or raise run.start_timeout_s"
        ) from error
