"""Server of objects in the memory of a process, and the client by which other processes fetch them.

    holder    ShardServer.lend         a handle, which travels to readers
    reader    fetch                    request -> size -> bytes -> "done", or an error

Requests, replies and errors are small JSON messages on a socket, between them are bytes. The text of an
error is sent to the other end, and raised there.

Promises:
- Readers are served concurrently, each with a deadline. A reader that hangs, dies or raises does not
  delay the others, and the holder logs its error.
- All waits end with the deadline, its cancel, or the death of the other process.
- Bytes that a reader is fetching stay until it has them, whatever is dropped meanwhile.
- A process that runs out of file descriptors or threads for a reader pauses, then serves again.
- A process without a handle, and so without the server's token, gets nothing.

The token keeps other programs out. Bytes are not encrypted: as with NCCL, gloo and Ray, the network
of the cluster has to be trusted.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
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


log = logging.getLogger(__name__)

HELLO_S = 30.0
"""Seconds that a connection may take to send its request."""

MAX_CONNECTIONS = 256
"""Connections that one process serves at once; each has a thread."""

PAUSE_S = 1.0
"""Seconds of pause after an error of the operating system, before the next reader is accepted."""

_CHUNK_BYTES = 16 << 20  # of host memory that a fetch needs

_Chunks = tuple[memoryview, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Handle of an object, which travels to readers: its server's address, key and token."""

    server: str
    host: str
    port: int
    key: int
    token: str = field(repr=False)


class ShardServer:
    """Server of the objects of one process. `close` when done."""

    def __init__(
        self,
        name: str,
        host: str,
        timeout_s: float,
        told: Callable[[str], None] = log.warning,
        max_connections: int = MAX_CONNECTIONS,
        listener: socket.socket | None = None,
        pause: Callable[[threading.Event], object] = lambda closed: closed.wait(PAUSE_S),
    ) -> None:
        """Start to listen, in a thread.

        Args:
            name: the server's name in errors.
            host: the address that readers reach, and the only one that is listened at.
            timeout_s: limit of a transfer, in seconds; a reader may ask for less.
            told: gets a message per failed transfer, and per connection that was not accepted.
            max_connections: readers that are served at once.
            listener: a socket to use instead of a new one.
            pause: waits before the next reader is accepted, less where the server is closed meanwhile.
        """
        self._name, self._host, self._timeout_s, self._told = name, host, timeout_s, told
        self._pause = pause
        self._token = secrets.token_hex(16)
        self._connections = threading.Semaphore(max_connections)
        self._lock = threading.Lock()
        self._next = 0
        self._closed = threading.Event()
        self.held: dict[int, _Chunks] = {}
        self._listener = listener or socket.create_server((host, 0), backlog=128)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name=f"{name}-shards", daemon=True).start()

    def lend(self, chunks: Sequence[memoryview]) -> Served:
        """Serve memory of the caller, which must not change, until `drop`. Return its handle."""
        with self._lock:
            self._next += 1
            self.held[self._next] = tuple(chunks)
            return Served(
                server=self._name,
                host=self._host,
                port=self._port,
                key=self._next,
                token=self._token,
            )

    def drop(self, keys: Collection[int]) -> None:
        """Stop serving these objects. Transfers in progress complete."""
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else `accept` takes another reader
        self._listener.close()

    def _accept(self) -> None:
        """Accept readers until `close`, each in a thread.

        Waits for: a reader. With `max_connections` of them, for one to end; a connection that sends no
        request ends after `HELLO_S`. Others wait in the listener's queue meanwhile.
        """
        while not self._closed.is_set():
            if not self._connections.acquire(timeout=HELLO_S):
                continue
            connection = None
            try:
                connection, (host, port, *_) = self._listener.accept()
                wire = Wire(connection, f"reader {host}:{port}")
                threading.Thread(target=self._serve, args=(wire,), daemon=True).start()
            except (OSError, RuntimeError) as error:  # no file descriptor or no thread is left
                self._connections.release()
                if connection is not None:
                    connection.close()
                if not self._closed.is_set():
                    self._told(
                        f"{self._name}: a reader was not let in ({error}). The next one is in "
                        f"{PAUSE_S:g} s"
                    )
                    self._pause(self._closed)

    def _serve(self, wire: Wire) -> None:
        try:
            ask = wire.hear(Deadline(f"{wire.peer}: its request", HELLO_S), "a request")
            if not hmac.compare_digest(str(ask.get("token")), self._token):
                raise WeightError(f"{wire.peer} asks without this process's token")
            wire.peer = f"{ask['reader']} at {wire.peer.removeprefix('reader ')}"
            timeout_s = min(float(ask["timeout_s"]), self._timeout_s)
            key = int(ask["key"])
            self._give(
                wire, key, Deadline(f"{self._name}: object {key} for {wire.peer}", timeout_s)
            )
        except Exception as error:  # of any kind: it is reported to both sides
            self._told(f"{self._name}: a reader did not get its shard: {error}")
            wire.tell_error(error)
        finally:
            wire.close()
            self._connections.release()

    def _give(self, wire: Wire, key: int, deadline: Deadline) -> None:
        chunks = self.held.get(key)
        if chunks is None:
            raise WeightError(
                f"object {key} is lost: {self._name} holds it no more. Pull the latest version"
            )
        wire.tell(deadline, num_bytes=sum(len(chunk) for chunk in chunks))
        for chunk in chunks:
            wire.send(chunk, deadline)
        wire.hear(deadline, "the reader's thanks")


def fetch(
    handle: Served, reader: str, deadline: Deadline, write: Callable[[memoryview], object]
) -> None:
    """Fetch an object, and pass its bytes to `write`, piece by piece.

    `reader` is the name of this process in the server's errors. An error that `write` raises ends the
    transfer, and is raised here.

    Waits for: the server. Raises `WeightError`: the server cannot be reached, does not hold the object
    any more, or dies; `StalledError`.
    """
    where = f"{handle.server} at {handle.host}:{handle.port}"
    left_s = deadline.left_s(where)
    try:
        connection = socket.create_connection((handle.host, handle.port), min(left_s, HELLO_S))
    except OSError as error:
        raise WeightError(
            f"object {handle.key} is lost: {where}, which held it, cannot be reached ({error})"
        ) from error
    with contextlib.closing(Wire(connection, where)) as wire:
        try:
            _take(wire, handle, reader, deadline, write)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightError(f"{where} does not speak this protocol ({error!r})") from error
        except (WeightError, OSError) as error:  # a `StalledError` too, as every TimeoutError
            wire.tell_error(error)
            raise


def _take(
    wire: Wire,
    handle: Served,
    reader: str,
    deadline: Deadline,
    write: Callable[[memoryview], object],
) -> None:
    what = f"object {handle.key} of {handle.server}"
    left_s = deadline.left_s(what)
    wire.tell(deadline, reader=reader, token=handle.token, key=handle.key, timeout_s=left_s)
    left = int(wire.hear(deadline, what)["num_bytes"])
    chunk = memoryview(bytearray(min(left, _CHUNK_BYTES)))
    while left:
        piece = chunk[:left]
        wire.receive(piece, deadline, what)
        write(piece)
        left -= len(piece)
    wire.tell(deadline, done=True)
