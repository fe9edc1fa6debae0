"""Bytes that stay in the memory of the process that has them, from where others fetch them.

    holder    ShardServer.lend         a handle, which travels to readers
    reader    fetch                    ask -> size -> bytes -> "done", or why not

Promises:
- readers are served beside each other, each with a deadline: one that hangs, dies or raises costs
  the others nothing, and its words are logged by the holder;
- bytes that a reader is taking stay until it has them, whatever is dropped meanwhile;
- a process that has no file descriptor, or no thread, left for a reader pauses and serves on;
- whoever has no handle, and so not the server's token, is given nothing.

The token keeps other programs out, and bytes are not encrypted: as with NCCL, gloo and Ray, the
network of the cluster has to be trusted.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.transports.transport import Deadline
from rlhf_cluster.weights.transports.wire import Wire

log = logging.getLogger(__name__)

HELLO_S = 30.0
"""How long a connection may take to say what it wants."""
MAX_CONNECTIONS = 256
"""Connections that one process serves at once; each has a thread."""
PAUSE_S = 1.0
"""After an error of the operating system, before the next reader is let in."""
_CHUNK_BYTES = 16 << 20  # of host memory that a fetch needs

_Chunks = tuple[memoryview, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Where an object is: the handle that travels to readers."""

    server: str
    host: str
    port: int
    key: int
    token: str = field(repr=False)


class ShardServer:
    """Serves the objects of one process. `close` when done."""

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
        """`host` is the address that readers reach and the only one that is listened at. `timeout_s`
        bounds a transfer; a reader may ask for less. `told` gets the words of failed ones. `pause`
        waits before the next try, less where the server is closed meanwhile."""
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
        """Serve memory of the caller's, which does not change, until `drop`."""
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
        for key in keys:
            self.held.pop(key, None)

    def close(self) -> None:
        self._closed.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else `accept` goes on for one more reader
        self._listener.close()

    def _accept(self) -> None:
        """Waits for: readers, until `close`; with `max_connections` of them, for one to end, a
        stranger's at its `HELLO_S`. Others wait in the listener's queue meanwhile."""
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
        except Exception as error:  # whatever it is, both sides are told
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
    """Hand the bytes of an object to `write`, piece by piece. `reader` is what the server calls this
    process. What `write` raises ends the transfer.

    Waits for: the server. Raises `WeightError`: it cannot be reached, or holds the object no more, or
    dies; `StalledError`.
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
