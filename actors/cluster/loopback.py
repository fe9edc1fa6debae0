"""A Ray cluster that listens on loopback alone, and joining one.

On Linux, Ray takes a machine's outward address even where it is given 127.0.0.1, and then listens on
all interfaces: whoever reaches the machine could run code in the run's processes. Where it believes
that it is on a system without clusters of several nodes, it stays on 127.0.0.1 with each of its
sockets (`tests/component/test_loopback.py`).
"""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

from ray._private import ray_constants
from ray.util import get_node_ip_address

CONNECT_TIMEOUT_S = 2.0
ANSWER_TIMEOUT_S = 10.0
LOOPBACK = "127.0.0.1"
_VARIABLE = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR


def stay_on_loopback(stay: bool = True) -> None:
    """The cluster that this process starts or joins next is at 127.0.0.1; with `stay` False it is
    wherever Ray takes it to be."""
    os.environ[_VARIABLE] = "0" if stay else "1"  # of Ray's processes
    ray_constants.ENABLE_RAY_CLUSTER = not stay
    if stay:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    elif os.environ.get("GLOO_SOCKET_IFNAME") == "lo":
        del os.environ["GLOO_SOCKET_IFNAME"]


def refuse_silent(address: str, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Raise `ConnectionError` where nobody answers at `address`, HOST:PORT with or without a scheme,
    within `timeout_s`: Ray itself would ask a cluster that has ended for many minutes."""
    parts = urlsplit(address if "://" in address else f"//{address}")
    if parts.hostname is None or parts.port is None:
        return
    try:
        socket.create_connection((parts.hostname, parts.port), timeout_s).close()
    except OSError as error:
        raise ConnectionError(f"nobody listens there ({error}): it may have ended") from error


def follow(address: str, outward: str | None = None) -> None:
    """`stay_on_loopback` if the cluster to join at `address`, HOST:PORT, is on loopback and does not
    answer at this machine's `outward` address (default: the one that Ray would take)."""
    stay_on_loopback(False)
    host, _, port = address.rpartition(":")
    if host != LOOPBACK or not port.isdigit():
        return
    try:
        own = outward or get_node_ip_address()
        socket.create_connection((own, int(port)), CONNECT_TIMEOUT_S).close()
    except OSError:
        stay_on_loopback()
