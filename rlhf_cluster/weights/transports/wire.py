"""A socket between two processes: requests, replies and errors as small JSON messages, and bytes.

All waits end with the deadline, its cancel, or the death of the other process. The text of an error
is sent to the other end, and raised there.
"""

from __future__ import annotations

import contextlib
import json
import socket
from typing import Any

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.transport import Deadline

MAX_MESSAGE_BYTES = 1 << 16
MAX_TEXT_CHARACTERS = 4000
POLL_S = 0.2
"""Seconds within which a wait ends after its deadline was cancelled."""
LAST_WORDS_S = 2.0
"""Seconds for which a failed transfer tries to send the reason to the other side."""


class Wire:
    """One end of a socket. `peer` is the name of the other end in errors."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._socket, self.peer = connection, peer
        connection.settimeout(POLL_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def tell(self, deadline: Deadline, **message: Any) -> None:
        """Send a message. Raises `WeightError` when the connection is closed, `StalledError`."""
        data = json.dumps(message).encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise WeightError(f"a message has {len(data)} bytes, at most {MAX_MESSAGE_BYTES}")
        self.send(memoryview(len(data).to_bytes(4, "big") + data), deadline)

    def hear(self, deadline: Deadline, waits_for: str) -> dict[str, Any]:
        """Receive the next message.

        Raises `WeightError` with the text of an error that the other side sent, or when the connection
        is closed or speaks another protocol; `StalledError`.
        """
        head = bytearray(4)
        self.receive(memoryview(head), deadline, waits_for)
        size = int.from_bytes(head, "big")
        if size > MAX_MESSAGE_BYTES:
            raise WeightError(f"{self.peer} does not speak this protocol")
        data = bytearray(size)
        self.receive(memoryview(data), deadline, waits_for)
        try:
            message = json.loads(data)
        except ValueError as error:
            raise WeightError(f"{self.peer} does not speak this protocol ({error})") from error
        if not isinstance(message, dict):
            raise WeightError(f"{self.peer} does not speak this protocol")
        if "error" in message:
            raise WeightError(f"{self.peer}: {message['error']}")
        return message

    def tell_error(self, error: BaseException) -> None:
        """Send the reason why this side ends the transfer, if the other side still listens."""
        with contextlib.suppress(WeightError, TimeoutError):
            text = f"{type(error).__name__}: {error}"[:MAX_TEXT_CHARACTERS]
            self.tell(Deadline("an error's text", LAST_WORDS_S), error=text)

    def send(self, data: memoryview, deadline: Deadline) -> None:
        """Send all of `data`. Raises `WeightError` when the connection is closed, `StalledError`."""
        while data:
            deadline.left_s(f"{self.peer} to take {len(data)} bytes")
            try:
                data = data[self._socket.send(data) :]
            except TimeoutError:
                continue
            except OSError as error:
                raise WeightError(f"{self.peer} is disconnected ({error})") from error

    def receive(self, target: memoryview, deadline: Deadline, waits_for: str) -> None:
        """Fill `target`. Raises `WeightError` when the connection is closed, `StalledError`."""
        while target:
            deadline.left_s(waits_for)
            try:
                size = self._socket.recv_into(target)
            except TimeoutError:
                continue
            except OSError as error:
                raise WeightError(f"{self.peer} is disconnected ({error})") from error
            if size == 0:
                raise WeightError(f"{self.peer} is disconnected: it closed the connection")
            target = target[size:]

    def close(self) -> None:
        self._socket.close()
