"""Connection of a run to a Ray cluster: an existing one, or one started on this machine.

A cluster that is started here listens on loopback alone. On Linux, Ray uses a machine's outward address
even if it is configured with 127.0.0.1, and then listens on all interfaces. Any host that reaches the
machine could run code in the run's processes. On a system without clusters of several nodes Ray keeps
all its sockets on 127.0.0.1, so this module makes it believe that it runs on one
(`tests/component/test_loopback.py`).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.errors import ConfigError, PlacementError

# Ray turns token authentication on automatically depending on the home directory, so the choice is made
# here, before the import.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import ray
from ray._private import ray_constants
from ray.util import get_node_ip_address

from actors.cluster.calls import NAMESPACE
from actors.cluster.launch import resources_by_node
from rlhf_cluster.planning import doctor
from rlhf_cluster.planning.doctor import Finding
from rlhf_cluster.planning.placement import address_of, demand, judge_placement, local_cpus
from rlhf_cluster.util.addresses import check_address

OBJECT_STORE_BYTES = 512 << 20
CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"
_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


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
    try:
        if address is not None:
            join(address)
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


def join(address: str) -> None:
    """Join the Ray cluster at `address`.

    Raises: `ConnectionError`, `RuntimeError` or `ValueError`.
    """
    refuse_silent(address)
    follow_loopback(address)
    ray.init(
        address=address,
        namespace=NAMESPACE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def _start_local(config: AnyConfig) -> None:
    section = config.cluster
    if section.dashboard:
        _check_port_free(section.dashboard_port)
    stay_on_loopback()
    ray.init(
        address="local",
        namespace=NAMESPACE,
        num_cpus=local_cpus(config),
        include_dashboard=section.dashboard,
        dashboard_host=LOOPBACK,
        dashboard_port=section.dashboard_port if section.dashboard else None,
        object_store_memory=section.object_store_bytes or OBJECT_STORE_BYTES,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )


def stay_on_loopback(stay: bool = True) -> None:
    """Keep the cluster that this process starts or joins next on 127.0.0.1.

    Without `stay`, Ray chooses the address.
    """
    os.environ[_VARIABLE] = "0" if stay else "1"  # inherited by Ray's processes
    ray_constants.ENABLE_RAY_CLUSTER = not stay
    if stay:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    elif os.environ.get("GLOO_SOCKET_IFNAME") == "lo":
        del os.environ["GLOO_SOCKET_IFNAME"]


def refuse_silent(address: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Raise `ConnectionError` if nothing listens at `address` within `timeout_s`.

    Ray itself would try to reach a cluster that has ended for many minutes.

    Args:
        address: HOST:PORT, with or without a scheme.
    """
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        return
    try:
        socket.create_connection((parts.hostname, parts.port), timeout_s).close()
    except OSError as error:
        raise ConnectionError(f"nothing listens there ({error}): it may have ended") from error


def follow_loopback(address: str, outward: str | None = None) -> None:
    """Call `stay_on_loopback` if the cluster to join listens on loopback alone.

    Args:
        address: HOST:PORT of the cluster. It listens on loopback alone if this is on loopback and the
            port does not answer at `outward`.
        outward: outward address of this machine; by default the one that Ray would use.
    """
    stay_on_loopback(False)
    host, _, port = address.rpartition(":")
    if host != LOOPBACK or not port.isdigit():
        return
    try:
        own = outward or get_node_ip_address()
        socket.create_connection((own, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError:
        stay_on_loopback()


def metrics_targets() -> list[str]:
    """Return HOST:PORT of each live node's Prometheus endpoint."""
    nodes = (node for node in ray.nodes() if node["Alive"])
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]


def placement(config: AnyConfig) -> Finding:
    """Judge whether the run fits the configured cluster, or this machine alone without one.

    The run may be meant for another cluster than this machine, so a bad verdict here is only a note.
    Raises `PlacementError`, `ConfigError` like a run that joins the cluster.
    """
    if address_of(config) is not None:
        return _on_the_cluster(config)
    here = {"CPU": float(local_cpus(config)), "GPU": float(len(doctor.gpus()))}
    found = judge_placement(demand(config), {"this machine": here}, here, 0.0)
    cure = "A run started here is refused. Meant for a cluster: set cluster.address"
    return found if found.verdict == "ok" else replace(found, verdict="note", cure=cure)


def _on_the_cluster(config: AnyConfig) -> Finding:
    with connected(config):
        nodes, free = resources_by_node(), ray.available_resources()
    return judge_placement(demand(config), nodes, free, config.cluster.node_timeout_s)


def _check_port_free(port: int) -> None:
    with socket.socket() as probe:
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise ConfigError(
                f"cluster.dashboard_port = {port}: the port is taken ({error.strerror}). Choose "
                "another one, or set cluster.dashboard = false"
            ) from error
