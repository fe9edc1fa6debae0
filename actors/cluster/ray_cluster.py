"""Connection of a run to a Ray cluster: an existing one, or one started on this machine."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.errors import ConfigError, PlacementError

# A local cluster listens on loopback alone (`actors.cluster.loopback`). Ray turns token authentication
# on automatically depending on the home directory, so the choice is made here, before the import.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray

from actors.cluster import loopback
from actors.cluster.named_actors import NAMESPACE
from rlhf_cluster.planning.cluster_room import (
    address_of,
    local_cpus,
)
from rlhf_cluster.util.addresses import check_address

OBJECT_STORE_BYTES = 512 << 20


@contextmanager
def connected(config: AnyConfig) -> Iterator[str]:
    """Connect to Ray for the duration of the block; yields the cluster's address.

    Raises:
        PlacementError: the cluster cannot be reached or started.
        ConfigError: the dashboard's port is taken, or the cluster is on another machine and asks for
            no token.
    """
    address = address_of(config)
    if address is not None:
        check_address("cluster.address or RAY_ADDRESS", address)
        loopback.follow(address)
    try:
        if address is not None:
            loopback.refuse_silent(address)
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            _start_local(config)
    except (ConnectionError, RuntimeError, TimeoutError, ValueError) as error:
        where = f"join the Ray cluster at {address}" if address else "start a local Ray cluster"
        raise PlacementError(
            f"cannot {where}: {error}. Check the address (cluster.address, RAY_ADDRESS) and that "
            "ray on both sides has the same version"
        ) from error
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _start_local(config: AnyConfig) -> None:
    section = config.cluster
    if section.dashboard:
        _check_port_free(section.dashboard_port)
    loopback.stay_on_loopback()
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=local_cpus(config),
        include_dashboard=section.dashboard,
        dashboard_host="127.0.0.1",
        dashboard_port=section.dashboard_port if section.dashboard else None,
        object_store_memory=section.object_store_bytes or OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def metrics_targets() -> list[str]:
    """Return HOST:PORT of each live node's Prometheus endpoint."""
    nodes = (node for node in ray.nodes() if node["Alive"])
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]


def _check_port_free(port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"cluster.dashboard_port = {port}: the port is taken ({error.strerror}). Choose "
                "another one, or set cluster.dashboard = false"
            ) from error
