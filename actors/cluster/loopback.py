"""Start and join of a Ray cluster that listens on loopback alone.

On Linux, Ray uses a machine's outward address even if it is configured with 127.0.0.1, and then listens
on all interfaces. Any host that reaches the machine could run code in the run's processes. On a system
without clusters of several nodes Ray keeps all its sockets on 127.0.0.1, so this module makes it
believe that it runs on one (`tests/component/test_loopback.py`).
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


def follow(address: str, outward: str | None = None) -> None:
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
