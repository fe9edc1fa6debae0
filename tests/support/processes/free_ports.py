"""Ports for servers that open them later, by number."""

from __future__ import annotations

import random
import socket

PORTS = range(20_000, 32_000)
"""Above Ray's worker ports and below those that the system gives to connections: nothing else takes
one of them between the look and the server's start."""


def free_ports(count: int) -> list[int]:
    """`count` ports that nobody listens on."""
    found: list[int] = []
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"fewer than {count} of the ports {PORTS} are free")
