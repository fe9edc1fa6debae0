"""The folder of a node's copies: made here, marked, and removed only with its mark.

    <weights.mirror>/rlhf_mirror_<user and store>/     .mark   .lock   v000001/   v000002/

A process that reads the copies holds a shared lock of the mark. A folder whose mark no process holds
belongs to a run that has ended.

Promises:
- Only a folder that this user's processes made, with the name and the mark of one, is ever removed.
  Other files in `weights.mirror` may have any name.
- The folder belongs to one store: two runs of one name that write to different stores have different
  folders.
- A folder has its name only together with its mark, and loses both at once. The mark is the last file
  to be deleted, so that the next sweep finishes one that was killed.
- A process that is killed before it makes the mark, or after it removed it, leaves an empty folder
  whose name has a suffix. A sweep removes such a folder of this user as long as it is empty.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

from rlhf_cluster.errors import StorageError
from rlhf_cluster.util.durable_files import take_lock
from rlhf_cluster.weights.transports.relay_plan import Piece
from rlhf_cluster.weights.transports.shared_files import free_bytes, version_dir
from rlhf_cluster.weights.transports.transport import Deadline

MARK = ".mark"
_NAME = re.compile(r"rlhf_mirror_[0-9a-f]{16}(\.[0-9a-f]{8})?")
"""Name of a folder of copies, with a suffix while it is made or removed."""
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
_LOCK_POLL_S = 0.05


class FilePart:
    """A file with a temporary name until `keep` (`mirror_ports.Part`)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        self._file = self._partial.open("xb", buffering=0)

    @property
    def num_bytes(self) -> int:
        return self._file.tell()

    def write(self, data: bytes | memoryview) -> None:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += self._file.write(view[done:])

    def keep(self) -> None:
        self._file.close()
        self._partial.replace(self._path)

    def close(self) -> None:
        self._file.close()
        self._partial.unlink(missing_ok=True)


class NodeCopies:
    """Copies in the folder `copies_of(root, mirror)` (`mirror_ports.Copies`)."""

    def __init__(
        self,
        root: str | Path,
        mirror: str | Path,
        free: Callable[[Path], int] = free_bytes,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.local = copies_of(root, mirror)
        self._free, self._sleep = free, sleep
        self._use: int | None = None

    @property
    def where(self) -> str:
        return str(self.local)

    def path(self, version: int) -> str:
        return str(version_dir(self.local, version))

    @contextlib.asynccontextmanager
    async def turn(self, deadline: Deadline) -> AsyncIterator[None]:
        """Hold the lock of the node's copies inside the block.

        Waits for: the other readers of this node, with a check every `_LOCK_POLL_S`. Raises
        `StalledError` past the deadline; `OSError`.
        """
        fd = None
        try:
            self._begin_use(deadline)
            path = self.local / ".lock"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            while not take_lock(fd, path):
                deadline.left_s(f"{path}, which another reader of this node holds")
                self._sleep(_LOCK_POLL_S)
            yield
        finally:
            if fd is not None:
                os.close(fd)

    def _begin_use(self, deadline: Deadline) -> None:
        """Keep `sweep` from removing the folder until `leave`, or the end of this process."""
        if self._use is not None and not is_in_use(self._use, self.local):
            os.close(self._use)  # the folder was removed
            self._use = None
        if self._use is None:
            sweep(self.local.parent)
        while self._use is None:
            self._use = begin_use(self.local)
            if self._use is None:
                deadline.left_s(f"{self.local}, which a reader that starts on this node holds")
                self._sleep(_LOCK_POLL_S)

    def has(self, piece: Piece) -> bool:
        return self._path(piece).exists()

    def read(self, piece: Piece) -> bytes:
        return self._path(piece).read_bytes()

    def identity(self, piece: Piece) -> object | None:
        try:
            return _identity(self._path(piece).stat())
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def part(self, piece: Piece) -> Iterator[FilePart]:
        path = self._path(piece)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = FilePart(path)
        try:
            yield part
        finally:
            part.close()

    def mapped(self, piece: Piece) -> tuple[memoryview, object]:
        """Map the file of `piece`, and return its memory and its identity.

        Mapping is safe, because files are removed here, and never truncated.
        """
        with self._path(piece).open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return data, _identity(os.fstat(file.fileno()))

    def versions(self) -> list[int]:
        names = (folder.name[1:] for folder in self.local.glob("v*"))
        return [int(name) for name in names if name.isdigit()]

    def remove(self, version: int) -> None:
        shutil.rmtree(version_dir(self.local, version), ignore_errors=True)

    def remove_parts(self) -> None:
        for partial in self.local.glob("v*/.*.partial"):
            partial.unlink(missing_ok=True)

    def free_bytes(self) -> int:
        return self._free(self.local)

    def leave(self) -> None:
        if self._use is not None:
            os.close(self._use)
            self._use = None
        sweep(self.local.parent)

    def _path(self, piece: Piece) -> Path:
        return version_dir(self.local, piece.version) / piece.name


def _identity(found: os.stat_result) -> tuple[int, int]:
    """Return the inode and the time of a file: the inode alone may be reused after its removal."""
    return found.st_ino, found.st_mtime_ns


def copies_of(root: str | Path, mirror: str | Path) -> Path:
    """Return the folder below `mirror` in which this user's processes keep copies of store `root`."""
    key = f"{os.geteuid()} {Path(root).absolute()}"
    return Path(mirror).absolute() / f"rlhf_mirror_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def begin_use(local: Path) -> int | None:
    """Make the folder if it does not exist, and return the descriptor of its mark.

    No `sweep` removes the folder until the descriptor is closed. None: another process makes or
    removes the folder at this moment; ask again. Raises `FileExistsError` where the name is taken by
    something else; `OSError`, `StorageError`.
    """
    local.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(local):
        return _make(local)
    if not _is_ours(local):
        if not os.path.lexists(local):
            return None
        raise FileExistsError(
            f"{local} exists, and is not a folder that this user's runs made there ({MARK} is missing "
            "or another user's). Move it away, or give weights.mirror another folder"
        )
    try:
        fd = os.open(local / MARK, _FLAGS)
    except FileNotFoundError:
        return None
    return _lock_mark(fd, local)


def is_in_use(fd: int, local: Path) -> bool:
    """Return whether `fd`, from `begin_use`, is still the mark of the folder `local`."""
    try:
        found = os.lstat(local / MARK)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(fd))


def sweep(mirror: Path) -> None:
    """Remove the folders of copies below `mirror` that no process of this node uses."""
    for folder in sorted(mirror.glob("rlhf_mirror_*")):
        if not _NAME.fullmatch(folder.name):
            continue
        with contextlib.suppress(OSError, StorageError):
            if _is_ours(folder):
                _remove_if_unheld(folder)
            elif folder.suffix and os.lstat(folder).st_uid == os.geteuid():
                folder.rmdir()  # fails for a folder that is not empty, and for a link


def _remove_if_unheld(folder: Path) -> None:
    fd = os.open(folder / MARK, _FLAGS)
    try:
        if take_lock(fd, folder / MARK) and is_in_use(fd, folder):
            doomed = folder
            if not folder.suffix:
                doomed = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
                folder.rename(doomed)
            _remove_mark_last(doomed)
    finally:
        os.close(fd)


def _remove_mark_last(folder: Path) -> None:
    """Remove `folder`, its mark last: the next sweep completes a removal that was cut short."""
    for entry in list(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name != MARK:
            entry.unlink(missing_ok=True)
    if os.listdir(folder) == [MARK]:
        shutil.rmtree(folder, ignore_errors=True)


def _make(local: Path) -> int | None:
    fresh = local.with_name(f"{local.name}.{secrets.token_hex(4)}")
    fresh.mkdir(mode=0o700)
    fd = None
    try:
        fd = _lock_mark(os.open(fresh / MARK, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600), fresh)
        if fd is not None:
            fresh.rename(local)
    except OSError:
        if fd is not None:
            os.close(fd)
        was_swept = not os.path.lexists(fresh)  # while it was empty
        shutil.rmtree(fresh, ignore_errors=True)
        if was_swept or os.path.lexists(local):  # or another process was first
            return None
        raise
    return fd


def _lock_mark(fd: int, folder: Path) -> int | None:
    """Take a shared lock of `fd`, and return it; None, and closed, where a sweep was first."""
    try:
        if take_lock(fd, folder / MARK, shared=True) and is_in_use(fd, folder):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _is_ours(folder: Path) -> bool:
    try:
        whole, mark = os.lstat(folder), os.lstat(folder / MARK)
    except OSError:
        return False
    ours = whole.st_uid == mark.st_uid == os.geteuid()
    return ours and stat.S_ISDIR(whole.st_mode) and stat.S_ISREG(mark.st_mode)
