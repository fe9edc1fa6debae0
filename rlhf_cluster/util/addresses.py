"""Which addresses may be used without a token: those of this machine.

Whoever reaches a Ray cluster that asks for no token runs code on it. A run therefore joins a cluster of
another machine, and sends jobs there, only with Ray's token authentication (RAY_AUTH_MODE=token; the
token is RAY_AUTH_TOKEN, or in the file RAY_AUTH_TOKEN_PATH, or in ~/.ray/auth_token).
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Callable, Mapping
from urllib.parse import urlsplit

from rlhf_cluster.errors import ConfigError

MODE, TOKEN = "RAY_AUTH_MODE", "token"
_WORDS = ("auto", "local")  # Ray's words for a cluster of this machine


def is_of_this_machine(host: str) -> bool:
    """Whether `host`, a name or an IP address, is one that this machine has."""
    if host.rstrip(".").lower() == "localhost":
        return True
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False
    return bool(found) and all(_has(family, str(end[0])) for family, _, _, _, end in found)


def refuse_open(
    key: str,
    address: str,
    variables: Mapping[str, str] = os.environ,
    is_here: Callable[[str], bool] = is_of_this_machine,
) -> None:
    """Raise `ConfigError` for an `address` (HOST:PORT, with or without a scheme; the setting or option
    `key`) of another machine, unless token authentication is on."""
    if address in _WORDS or variables.get(MODE, "").lower() == TOKEN:
        return
    host = urlsplit(address if "://" in address else f"//{address}").hostname
    if host is None or not is_here(host):
        raise ConfigError(
            f"{key} = {address!r} is on another machine, and {MODE} = {variables.get(MODE)!r}: "
            "whoever reaches a cluster without tokens runs code on it. Start the cluster with "
            f"{MODE}={TOKEN}, and set that and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) here too; or "
            "give an address of this machine, such as the end of an SSH tunnel"
        )


def _has(family: int, address: str) -> bool:
    if ipaddress.ip_address(address.partition("%")[0]).is_loopback:
        return True
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True
