"""Check of cluster addresses: without a token, only addresses of this machine are allowed.

Any process that can reach a Ray cluster without token authentication can run code on it. A run
therefore joins a cluster on another machine, and sends jobs there, only with Ray's token
authentication (RAY_AUTH_MODE=token). Ray reads the token from RAY_AUTH_TOKEN, from the file
RAY_AUTH_TOKEN_PATH, or from ~/.ray/auth_token.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from rlhf_cluster.errors import ConfigError

MODE, TOKEN = "RAY_AUTH_MODE", "token"
_WORDS = ("auto", "local")  # Ray's names for a cluster of this machine


def is_local_host(host: str) -> bool:
    """Whether `host`, a name or an IP address, resolves to addresses of this machine only."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_has(family, str(end[0])) for family, _, _, _, end in found)


def check_address(
    key: str,
    address: str,
    variables: Mapping[str, str] = os.environ,
    is_here: Callable[[str], bool] = is_local_host,
) -> None:
    """Refuse an address on another machine unless token authentication is on.

    `address` is HOST:PORT, with or without a scheme, and `key` is its setting or option. Raises
    `ConfigError`.
    """
    if address in _WORDS or variables.get(MODE, "").lower() == TOKEN:
        return
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    if host is None or not is_here(host):
        raise ConfigError(
            f"{key} = {address!r} is on another machine, and {MODE} = {variables.get(MODE)!r}: "
            "any process that reaches a cluster without tokens can run code on it. Start the cluster "
            f"with {MODE}={TOKEN}, and set that and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here; or "
            "give an address of this machine, such as the end of an SSH tunnel"
        )


def _has(family: int, address: str) -> bool:
    """Whether this machine has the address: only then can a socket be bound to it."""
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
