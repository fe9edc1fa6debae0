"""A copy of the newest version in a folder of this node, for all its readers.

    storage or another node --> local folder --> every reader of this node, and other nodes

Which file comes from where is the plan of `relay_plan`: the storage gives each file about
once, however many nodes there are. Readers then read the local folder as they would the storage,
and verify as much.

Promises:
- a node brings each file once, whatever number of readers it has: one of them brings, the others
  wait;
- a file has its name only when it is whole, and is as long as the manifest says; what is in it is
  verified by who reads it, and a version that was found damaged (`distrust`) is brought again,
  from the storage;
- a planner that cannot be asked costs the relay and not the version: all comes from the storage
  then;
- every wait ends with the deadline, and with it the hold that this reader has of the node, also where
  a storage does not answer; a fetch from a node that hangs ends with its lease, and goes on elsewhere;
- a folder that has no room, or cannot be written, costs the copy and not the version: its readers are
  sent to the storage, and nothing of the version stays;
- files of runs that have ended are removed by the next run that has readers on this node, and
  nothing else ever is (`mirror_folder`).

Space: the files of the newest version and those that it builds on, and while it comes those of
the one before. Bytes between nodes are not encrypted, as in `rank_memory`.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import logging
import mmap
import os
import queue
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rlhf_cluster.errors import StalledError, StorageError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.durable_files import take_lock
from rlhf_cluster.weights.manifest import Manifest, decode
from rlhf_cluster.weights.transports.mirror_folder import (
    begin_use,
    copies_of,
    is_in_use,
    sweep,
)
from rlhf_cluster.weights.transports.rank_memory import (
    ShardServer,
    fetch,
)
from rlhf_cluster.weights.transports.relay_plan import (
    Assignment,
    Piece,
)
from rlhf_cluster.weights.transports.shared_files import (
    MANIFEST_NAME,
    free_bytes,
    gone,
    version_dir,
)
from rlhf_cluster.weights.transports.transport import Deadline

log = logging.getLogger(__name__)

PARALLEL = 4
"""Files that a node fetches at once, and that it gives to others at once."""
MAX_FAILURES = 8
"""Fetches of one version that may fail in a row of any kind before the version is refused."""
_LOCK_POLL_S = 0.05
_ASK_AGAIN_S = (0.01, 0.5)  # the first pause where there is no turn, and the longest
_LOOK_S = 0.2  # between two looks at a deadline that another thread may cancel
_STOP_S = 0.5  # for threads to see that nobody waits for them any more
_CALL_BYTES = 16 << 20


class Planner(Protocol):
    """`RelayPlan`, wherever it is. Raises `WeightError` when it cannot be asked."""

    def exchange(
        self,
        node: str,
        wanted: Sequence[Piece],
        done: Sequence[tuple[Piece, Any]],
        failed: Sequence[tuple[Piece, str | None]],
    ) -> Assignment | None: ...

    def keeps(self, node: str, versions: Sequence[int]) -> None: ...


@dataclass(slots=True)
class _Wanted:
    """The pieces that a node still needs, for the threads that fetch them."""

    sizes: dict[Piece, int | None]
    open: list[Piece] = field(default_factory=list)
    failures: int = 0
    is_over: bool = False
    """Nobody waits for them any more."""
    ended: queue.SimpleQueue[BaseException | None] = field(default_factory=queue.SimpleQueue)
    """What each thread that has ended raised."""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def check(self) -> None:
        """Raise `WeightError` in a thread that goes on where the folder is another reader's by now."""
        if self.is_over:
            raise WeightError("the files are not waited for any more")


@dataclass(frozen=True, slots=True)
class _Lent:
    """A file that others may fetch: its memory is in use until the server drops `key`."""

    key: int
    inode: int


class Mirror:
    """The versions of store `root` in a folder below `mirror` of this node. Serves one call at a
    time."""

    def __init__(
        self,
        root: str | Path,
        mirror: str | Path,
        node: str,
        planner: Planner,
        server: ShardServer,
        lease_s: float = 120.0,
        sleep: Callable[[float], None] = time.sleep,
        free: Callable[[Path], int] = free_bytes,
        told: Callable[[str], None] = log.warning,
    ) -> None:
        """`node` names this process among all; `server` gives others what it has brought. `told` gets
        why a version is not brought to the node."""
        self._root, self._node = Path(root), node
        self.local = copies_of(root, mirror)
        self._planner, self._server, self._lease_s = planner, server, lease_s
        self._sleep, self._free, self._told = sleep, free, told
        self._lent: dict[Piece, _Lent] = {}
        self._seen: tuple[int, int] | None = None  # (version, when it came), of the last one
        self._distrusted: tuple[int, int] | None = None
        self._use: int | None = None

    def bring(self, version: WeightVersion, deadline: Deadline) -> WeightVersion:
        """`version`, with its path in the local folder, where all its files are, and those of the
        versions that it builds on; unchanged where the local folder cannot take it.

        Waits for: another reader of this node that brings it; its turn at a source; bytes. Raises
        `WeightError`, `StalledError`; other versions are as before then.
        """
        try:
            with self._locked(deadline):
                self._bring(version, deadline)
        except StalledError:
            raise
        except (OSError, StorageError) as error:
            self._told(
                f"{self._node} reads version {version.version} from {version.path}, since it cannot "
                f"be copied to {self.local} ({error}). Free space there, or give weights.mirror "
                "another folder"
            )
            return version
        return replace(version, path=str(version_dir(self.local, version.version)))

    def _bring(self, version: WeightVersion, deadline: Deadline) -> None:
        number = version.version
        incomplete = {number}
        try:
            if self._distrusted is not None and self._distrusted == self._here(number):
                self._remove(number)  # by nobody else of this node meanwhile
            else:
                self._distrusted = None
            manifest = self._manifest(number, version.digest, deadline)
            chain = [self._manifest(n.version, n.digest, deadline) for n in manifest.chain]
            missing = {
                piece: entry.num_bytes
                for m in (*chain, manifest)
                for name, entry in m.files.items()
                if not self._path(piece := Piece(m.version, name)).exists()
            }
            kept = [link.version for link in manifest.chain] + [number]
            incomplete |= {piece.version for piece in missing}
            self._make_room(sum(missing.values()), kept)
            self._fetch(dict(missing), deadline)
        except StalledError:
            raise
        except OSError:
            for half in incomplete:
                self._remove(half)
            with contextlib.suppress(WeightError):
                self._planner.keeps(self._node, [])  # a node in trouble gives nothing to others
            raise
        self._distrusted, self._seen = None, self._here(number)
        self._remove_all_but(kept)

    def _make_room(self, num_bytes: int, kept: Sequence[int]) -> None:
        """Remove other versions where the missing files of `kept` do not fit beside them.

        Raises `OSError` when they do not fit at all: a folder in memory is never filled to its end,
        which would cost the node more than a copy.
        """
        for partial in self.local.glob("v*/.*.partial"):
            partial.unlink(missing_ok=True)  # of a reader that was lost, or has given up
        if num_bytes and self._free(self.local) < num_bytes:
            self._remove_all_but(kept)
            free = self._free(self.local)
            if free < num_bytes:
                raise OSError(errno.ENOSPC, f"{num_bytes} bytes are missing, and {free} are free")

    def distrust(self, version: int) -> None:
        """`version` did not come out as published: bring it again next time, from the storage, unless
        another reader of this node did."""
        if self._seen is not None and self._seen[0] == version:
            self._distrusted = self._seen

    def close(self) -> None:
        """Serve nobody any more, and remove the files where this was the node's last reader."""
        self._server.close()
        if self._use is not None:
            os.close(self._use)
            self._use = None
        sweep(self.local.parent)

    # What is here

    def _path(self, piece: Piece) -> Path:
        return version_dir(self.local, piece.version) / piece.name

    def _here(self, number: int) -> tuple[int, int] | None:
        """Which copy of a version is here."""
        try:
            return number, self._path(Piece(number, MANIFEST_NAME)).stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _manifest(self, number: int, digest: str, deadline: Deadline) -> Manifest:
        """Of a version, in the local folder afterwards, with the digest that was announced."""
        piece = Piece(number, MANIFEST_NAME)
        for again in (False, True):
            if not self._path(piece).exists():
                self._fetch({piece: None}, deadline, from_storage=again)
            where = str(self._path(piece) if not again else version_dir(self._root, number))
            try:
                manifest = decode(self._path(piece).read_bytes(), where)
                if manifest.digest == digest:
                    return manifest
                raise WeightError(
                    f"{where}: digest {manifest.digest}, expected {digest}: not the version that was "
                    "announced. Pull the latest version again"
                )
            except WeightError:
                # damaged here, or published before under this number by a learner that was lost
                self._remove(number)
                if again:
                    raise
        raise AssertionError("the second try returns or raises")

    def _remove(self, number: int) -> None:
        self._end_loans([piece for piece in self._lent if piece.version == number])
        shutil.rmtree(version_dir(self.local, number), ignore_errors=True)

    def _remove_all_but(self, kept: Sequence[int]) -> None:
        for folder in self.local.glob("v*"):
            if folder.name[1:].isdigit() and int(folder.name[1:]) not in kept:
                self._remove(int(folder.name[1:]))
        # another reader of the node may have removed or replaced what this one lends
        self._end_loans([p for p in self._lent if p.version not in kept or not self._is_lent(p)])
        with contextlib.suppress(WeightError):  # it only saves others a question in vain
            self._planner.keeps(self._node, kept)

    def _is_lent(self, piece: Piece) -> bool:
        """Whether the file that is here is the one that others are given."""
        try:
            return self._path(piece).stat().st_ino == self._lent[piece].inode
        except FileNotFoundError:
            return False

    def _end_loans(self, pieces: Sequence[Piece]) -> None:
        self._server.drop([self._lent.pop(piece).key for piece in pieces])

    @contextlib.contextmanager
    def _locked(self, deadline: Deadline) -> Iterator[None]:
        """No other reader of this node brings anything inside the block; the folder is in use."""
        fd = None
        try:
            self._begin_use(deadline)
            path = self.local / ".lock"
            fd = _open(path)
            while not take_lock(fd, path):
                deadline.left_s(f"{path}, which another reader of this node holds")
                self._sleep(_LOCK_POLL_S)
            yield
        finally:
            if fd is not None:
                os.close(fd)

    def _begin_use(self, deadline: Deadline) -> None:
        """Until `close`, or the end of this process, `sweep` leaves the folder alone."""
        if self._use is not None and not is_in_use(self._use, self.local):
            os.close(self._use)  # somebody removed the folder
            self._use = None
        if self._use is None:
            sweep(self.local.parent)
        while self._use is None:
            self._use = begin_use(self.local)
            if self._use is None:
                deadline.left_s(f"{self.local}, which a reader that starts on this node holds")
                self._sleep(_LOCK_POLL_S)

    # Fetching

    def _fetch(
        self, sizes: dict[Piece, int | None], deadline: Deadline, from_storage: bool = False
    ) -> None:
        """All of these, `PARALLEL` at once. Raises the first failure that no other source can
        mend."""
        if not sizes:
            return
        wanted = _Wanted(sizes, open=list(sizes))
        direct = from_storage or self._distrusted is not None
        # A storage that does not answer holds a thread for ever: nobody waits for it, neither here
        # past the deadline nor at the end of the process.
        threads = [
            threading.Thread(
                target=self._work,
                args=(wanted, direct, deadline),
                name=f"{self._node}-mirror",
                daemon=True,
            )
            for _ in range(min(PARALLEL, len(sizes)))
        ]
        for thread in threads:
            thread.start()
        try:
            for _ in threads:
                self._await_one(wanted, deadline)
        finally:
            wanted.is_over = True
            grace = time.monotonic() + _STOP_S
            for thread in threads:
                thread.join(max(0.0, grace - time.monotonic()))

    def _await_one(self, wanted: _Wanted, deadline: Deadline) -> None:
        """Waits for: one more thread to end. Raises what it raised."""
        while True:
            left_s = deadline.left_s(f"some of {len(wanted.sizes)} files")
            try:
                error = wanted.ended.get(timeout=min(_LOOK_S, left_s))
            except queue.Empty:
                continue
            if error is not None:
                raise error
            return

    def _work(self, wanted: _Wanted, direct: bool, deadline: Deadline) -> None:
        error: BaseException | None = None
        try:
            self._fetch_some(wanted, direct, deadline)
        except BaseException as raised:  # raised again by who waits
            error = raised
        wanted.ended.put(error)

    def _fetch_some(self, wanted: _Wanted, direct: bool, deadline: Deadline) -> None:
        """Piece after piece until none is left. Waits for: its turn, and each piece."""
        pause_s, longest_s = _ASK_AGAIN_S
        while True:
            with wanted.lock:
                if wanted.is_over or not wanted.open:
                    return
                found = self._ask(wanted.open, direct)
                if found is not None:
                    wanted.open.remove(found.piece)
            if found is None:
                self._sleep(min(pause_s, deadline.left_s("its turn at a source of the weights")))
                pause_s = min(longest_s, 2 * pause_s)
                continue
            pause_s = _ASK_AGAIN_S[0]
            self._fetch_one(wanted, found, direct, deadline)

    def _ask(self, wanted: Sequence[Piece], direct: bool) -> Assignment | None:
        if direct:
            return Assignment(piece=wanted[0], source=None)
        try:
            return self._planner.exchange(self._node, wanted, (), ())
        except WeightError:
            return Assignment(piece=wanted[0], source=None)

    def _fetch_one(
        self, wanted: _Wanted, found: Assignment, direct: bool, deadline: Deadline
    ) -> None:
        piece = found.piece
        try:
            self._bring_one(found, wanted, deadline)
        except (WeightError, OSError) as error:
            is_local = isinstance(error, OSError) and not isinstance(error, StalledError)
            if not direct:
                is_own = is_local or wanted.is_over or _has_ended(deadline)
                self._report(failed=[(piece, blamed(found, is_own))])
            if is_local:
                raise
            deadline.left_s(f"{piece.name} of version {piece.version}")
            with wanted.lock:
                wanted.failures += 1
                if found.source is None or wanted.failures > MAX_FAILURES:
                    raise
                wanted.open.append(piece)
            return
        if not direct:
            self._report(done=[(piece, self._lend(piece))])

    def _report(self, done: Sequence[Any] = (), failed: Sequence[Any] = ()) -> None:
        with contextlib.suppress(WeightError):  # its lease ends by itself
            self._planner.exchange(self._node, (), done, failed)

    def _bring_one(self, found: Assignment, wanted: _Wanted, deadline: Deadline) -> None:
        piece, path = found.piece, self._path(found.piece)
        wanted.check()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            with partial.open("xb", buffering=0) as file:
                self._receive(found, file, wanted, deadline)
                num_bytes = file.tell()
            size = wanted.sizes[piece]
            if size is not None and num_bytes != size:
                raise WeightError(
                    f"{piece.name} of version {piece.version} has {num_bytes} bytes in "
                    f"{found.source or self._root}, expected {size}. Publish the version again"
                )
            wanted.check()
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _receive(self, found: Assignment, file: Any, wanted: _Wanted, deadline: Deadline) -> None:
        piece = found.piece
        if found.source is None:
            self._copy(version_dir(self._root, piece.version) / piece.name, file, wanted, deadline)
            return
        what = f"{piece.name} of version {piece.version} from {found.source}"
        lease = Deadline(what, min(self._lease_s, deadline.left_s(what)))
        fetch(found.address, self._node, lease, functools.partial(_write_all, file))

    def _copy(self, path: Path, file: Any, wanted: _Wanted, deadline: Deadline) -> None:
        with contextlib.ExitStack() as stack:
            try:
                stored = stack.enter_context(path.open("rb", buffering=0))
            except FileNotFoundError as error:
                raise WeightError(gone(str(path.parent))) from error
            except OSError as error:
                raise WeightError(f"{path}: cannot be opened ({error})") from error
            while True:
                deadline.left_s(str(path))
                wanted.check()
                try:
                    chunk = stored.read(_CALL_BYTES)
                except OSError as error:
                    raise WeightError(f"{path}: cannot be read ({error})") from error
                if not chunk:
                    return
                _write_all(file, chunk)

    def _lend(self, piece: Piece) -> Any:
        """The handle of a piece that is here. It is mapped, not copied: it is removed, never
        cut."""
        with self._path(piece).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            inode = os.fstat(file.fileno()).st_ino
        handle = self._server.lend([data])
        if piece in self._lent:
            self._end_loans([piece])
        self._lent[piece] = _Lent(handle.key, inode)
        return handle


def blamed(found: Assignment, is_own: bool) -> str | None:
    """Return whom a reader names to the plan when a fetch failed. A reader whose own deadline has
    passed, or whose own disk failed, knows nothing against the source (`is_own`)."""
    return None if is_own else found.source


def _has_ended(deadline: Deadline) -> bool:
    try:
        deadline.left_s()
    except (StalledError, WeightError):
        return True
    return False


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def _write_all(file: Any, data: bytes | memoryview) -> None:
    view = memoryview(data).cast("B")
    done = 0
    while done < len(view):
        done += file.write(view[done:])
