"""Shards that stay in the memory of the learner ranks, from where each reader takes them.

    rank      ShardServer.shelf -> ObjectSink     a copy of the shard in host memory, served from there
    reader    PeerObjects.fetch                   ask -> offer -> bytes -> "done", or why not

Promises:
- what is read is whole or an error: the manifest's hashes are checked by who asked, as with any
  transport, before a weight is touched;
- readers are served beside each other, each with a deadline: one that hangs, dies or raises costs
  the others nothing, and its words are logged by the rank;
- an object that a reader is taking stays until it has it, whatever is let go of meanwhile;
- whoever has no handle, and so not the server's token, is given nothing.

The token keeps other programs out, and bytes are not encrypted: as with NCCL, gloo and Ray, the
network of the cluster has to be trusted.
"""

from __future__ import annotations

import contextlib
import hmac
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from rlhf_cluster.errors import StalledError, WeightError
from rlhf_cluster.weights.transports.point_to_point import (
    Pair,
    Wire,
    carry,
    meet,
    serve_meeting,
    usable,
)
from rlhf_cluster.weights.transports.shared_memory import MemoryBlob
from rlhf_cluster.weights.transports.transport import Deadline

log = logging.getLogger(__name__)

BUCKET_BYTES = 64 << 20
"""Largest piece of an object in a pair."""
SMALL_BYTES = 1 << 20
"""Objects up to this go over the socket: to form a group takes longer."""
HELLO_S = 30.0
"""How long a connection may take to say what it wants."""

MAX_CONNECTIONS = 256
"""Connections that one process serves at once; each has a thread."""

_Chunks = tuple[memoryview, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """Where an object is: the handle that travels to readers."""

    server: str
    host: str
    port: int
    key: int
    sizes: tuple[int, ...]
    """Bytes of its chunks."""
    token: str = field(repr=False)


class Shelf:
    """The objects of one write, which belong to no version yet."""

    def __init__(self, put: Callable[[Sequence[Any]], Served]) -> None:
        self._put = put
        self.keys: list[int] = []

    def put(self, chunks: Sequence[bytes | bytearray | memoryview]) -> Served:
        handle = self._put(chunks)
        self.keys.append(handle.key)
        return handle


class ShardServer:
    """Serves the objects of one process. `close` when done."""

    def __init__(
        self,
        name: str,
        host: str,
        timeout_s: float,
        bucket_bytes: int = BUCKET_BYTES,
        small_bytes: int = SMALL_BYTES,
        told: Callable[[str], None] = log.warning,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """`host` is the address that readers reach and the only one that is listened at. `timeout_s`
        bounds a transfer; a reader may ask for less. `told` gets the words of failed ones."""
        self._name, self._host, self._timeout_s = name, host, timeout_s
        self._bucket_bytes, self._small_bytes, self._told = bucket_bytes, small_bytes, told
        self._token = secrets.token_hex(16)
        self._connections = threading.Semaphore(max_connections)
        self._lock = threading.Lock()
        self._next = 0
        self._closed = False
        self.held: dict[int, _Chunks] = {}
        self._versions: dict[int, list[int]] = {}
        self._replaced: list[int] = []
        self._listener = socket.create_server((host, 0), backlog=128)
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, name=f"{name}-shards", daemon=True).start()

    def shelf(self) -> Shelf:
        return Shelf(self._put)

    def keep(self, version: int, shelf: Shelf, listed: Collection[int]) -> None:
        """`shelf` holds `version`. Of the versions up to the newest of `listed`, which are those that
        readers can find, the others are given back. What the same version was before stays until
        the next call, since readers find it until the commit."""
        with self._lock:
            self.drop(self._replaced)
            self._replaced = self._versions.get(version, [])
            self._versions[version] = list(shelf.keys)
            newest = max(listed, default=-1)
            for old in [v for v in self._versions if v < newest and v not in listed]:
                self.drop(self._versions.pop(old))

    def drop(self, keys: Collection[int]) -> None:
        for key in keys:
            self.held.pop(key, None)

    def versions(self) -> list[int]:
        with self._lock:
            return sorted(self._versions)

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # else `accept` goes on for one more reader
        self._listener.close()

    def chunks(self, handle: Served) -> _Chunks | None:
        """The object of `handle` if this is the process that holds it. Raises `WeightError`: gone."""
        return self._find(handle.key) if hmac.compare_digest(handle.token, self._token) else None

    def lend(self, chunks: Sequence[memoryview]) -> Served:
        """Serve memory of the caller's, which does not change, until `drop`."""
        return self._hold(tuple(chunks))

    def _put(self, chunks: Sequence[Any]) -> Served:
        # numpy lets other threads run while it copies, a step of the learner above all.
        return self._hold(tuple(np.array(np.frombuffer(c, dtype=np.uint8)).data for c in chunks))

    def _hold(self, chunks: _Chunks) -> Served:
        with self._lock:
            self._next += 1
            self.held[self._next] = chunks
            return Served(
                server=self._name,
                host=self._host,
                port=self._port,
                key=self._next,
                sizes=tuple(len(chunk) for chunk in chunks),
                token=self._token,
            )

    def _find(self, key: int) -> _Chunks:
        found = self.held.get(key)
        if found is None:
            raise WeightError(
                f"object {key} is lost: {self._name} holds it no more. Pull the latest version"
            )
        return found

    def _accept(self) -> None:
        """Waits for: readers, until `close`; with `max_connections` of them, for one to end, a
        stranger's at its `HELLO_S`. Others wait in the listener's queue meanwhile."""
        while not self._closed:
            if not self._connections.acquire(timeout=HELLO_S):
                continue
            try:
                connection, (host, port, *_) = self._listener.accept()
            except OSError as error:
                if not self._closed:
                    self._told(f"{self._name} serves no more shards: {error}")
                return
            wire = Wire(connection, f"reader {host}:{port}")
            threading.Thread(target=self._serve, args=(wire,), daemon=True).start()

    def _serve(self, wire: Wire) -> None:
        try:
            ask = wire.hear(Deadline(f"{wire.peer}: its request", HELLO_S), "a request")
            if not hmac.compare_digest(str(ask.get("token")), self._token):
                raise WeightError(f"{wire.peer} asks without this process's token")
            wire.peer = f"{ask['reader']} at {wire.peer.removeprefix('reader ')}"
            timeout_s = min(float(ask["timeout_s"]), self._timeout_s)
            deadline = Deadline(f"{self._name}: object {ask['key']} for {wire.peer}", timeout_s)
            self._give(wire, int(ask["key"]), ask.get("backend"), timeout_s, deadline)
        except Exception as error:  # whatever it is, both sides are told
            self._told(f"{self._name}: a reader did not get its shard: {error}")
            wire.tell_error(error)
        finally:
            wire.close()
            self._connections.release()

    def _give(
        self, wire: Wire, key: int, backend: str | None, timeout_s: float, deadline: Deadline
    ) -> None:
        chunks = self._find(key)
        blob = MemoryBlob(f"object {key}", chunks)
        if blob.num_bytes <= self._small_bytes or not usable(backend):
            backend = None
        if backend is None:
            wire.tell(deadline, num_bytes=blob.num_bytes, backend=None)
            for chunk in chunks:
                wire.send(chunk, deadline)
            wire.hear(deadline, "the reader's thanks")
            return
        store = serve_meeting(self._host)
        pair = Pair(backend, 0, lambda: store, self._bucket_bytes, timeout_s)
        wire.tell(
            deadline,
            num_bytes=blob.num_bytes,
            backend=backend,
            port=store.port,
            bucket_bytes=self._bucket_bytes,
        )
        what = "the reader's thanks"
        try:
            if carry(lambda: pair.send(blob), wire, deadline, what) is None:
                wire.hear(deadline, what)
        finally:
            pair.close()


class PeerObjects:
    """Reads objects of any `ShardServer`. With a `backend`, large ones go through a pair."""

    def __init__(
        self,
        reader: str,
        backend: str | None,
        own: Callable[[], ShardServer | None] = lambda: None,
        received: Callable[[int], None] = lambda num_bytes: None,
    ) -> None:
        """`reader` is what servers call this process; `own` is its own server, asked without a wire;
        `received` is called in a pair's thread with the bytes of an object that are here."""
        self._reader, self._backend, self._own, self._received = reader, backend, own, received

    def fetch(self, handles: Sequence[Served], deadline: Deadline) -> list[Sequence[Any]]:
        """Waits for: each server in turn. Every process begins with another one."""
        found: dict[int, Sequence[Any]] = {}
        for index in _rotated(len(handles), os.getpid()):
            handle = handles[index]
            own = self._own()
            chunks = own.chunks(handle) if own is not None else None
            found[index] = _split(self._ask(handle, deadline), handle) if chunks is None else chunks
        return [found[index] for index in range(len(handles))]

    def _ask(self, handle: Served, deadline: Deadline) -> memoryview:
        where = f"{handle.server} at {handle.host}:{handle.port}"
        left_s = deadline.left_s(where)
        try:
            connection = socket.create_connection((handle.host, handle.port), min(left_s, HELLO_S))
        except OSError as error:
            raise WeightError(
                f"object {handle.key} is lost: {where}, which held it, cannot be reached ({error})"
            ) from error
        wire = Wire(connection, where)
        try:
            return self._take(wire, handle, deadline)
        except (KeyError, TypeError, ValueError) as error:
            raise WeightError(f"{where} does not speak this protocol ({error!r})") from error
        except (WeightError, StalledError) as error:
            wire.tell_error(error)
            raise
        finally:
            wire.close()

    def _take(self, wire: Wire, handle: Served, deadline: Deadline) -> memoryview:
        what = f"object {handle.key} of {handle.server}"
        wire.tell(
            deadline,
            reader=self._reader,
            token=handle.token,
            key=handle.key,
            backend=self._backend if usable(self._backend) else None,
            timeout_s=deadline.left_s(what),
        )
        offer = wire.hear(deadline, what)
        target = memoryview(bytearray(offer["num_bytes"]))
        if offer["backend"] is None:
            wire.receive(target, deadline, what)
        else:
            self._through_pair(wire, handle, offer, target, deadline, what)
        wire.tell(deadline, done=True)
        return target

    def _through_pair(
        self,
        wire: Wire,
        handle: Served,
        offer: dict[str, Any],
        target: memoryview,
        deadline: Deadline,
        what: str,
    ) -> None:
        left_s = deadline.left_s(what)
        pair = Pair(
            offer["backend"],
            1,
            lambda: meet(handle.host, offer["port"], left_s),
            offer["bucket_bytes"],
            left_s,
        )
        try:
            said = carry(lambda: pair.receive(target, self._received), wire, deadline, what)
        finally:
            pair.close()
        if said is not None:
            raise WeightError(f"{wire.peer} said {said} in the middle of {what}")


def _split(data: memoryview, handle: Served) -> list[memoryview]:
    ends = list(accumulate(handle.sizes, initial=0))
    return [data[a:b] for a, b in pairwise(ends)]


def _rotated(length: int, by: int) -> Iterator[int]:
    return ((index + by) % length for index in range(length))
