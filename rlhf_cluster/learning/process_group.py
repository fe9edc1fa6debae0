"""The group of learner ranks: where they meet, and how long anyone waits for the others."""

from __future__ import annotations

import datetime
from urllib.parse import urlparse

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from rlhf_cluster.errors import ConfigError, StalledError


def join_group(
    init_method: str,
    rank: int,
    world_size: int,
    device_type: str,
    start_timeout_s: float,
    collective_timeout_s: float,
) -> DeviceMesh:
    """Meet the other ranks and build the data-parallel mesh.

    Waits for all ranks to reach `init_method` (tcp://host:port, served by rank 0), at most
    `start_timeout_s`, so that ranks may take unequal time to load. After that every collective has
    `collective_timeout_s`.

    Raises:
        ConfigError: an address that is not tcp://host:port.
        StalledError: not all ranks came.
    """
    address = urlparse(init_method)
    if address.scheme != "tcp" or address.hostname is None or address.port is None:
        raise ConfigError(f"init_method = {init_method!r}: expected tcp://host:port")
    try:
        store = dist.TCPStore(  # pyright: ignore[reportPrivateImportUsage]
            address.hostname,
            address.port,
            world_size,
            is_master=rank == 0,
            timeout=datetime.timedelta(seconds=start_timeout_s),
            wait_for_workers=True,
        )
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
