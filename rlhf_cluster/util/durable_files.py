"""Files that survive a power cut, and errors of a storage that may pass.

Promises:
- `write_whole`: a reader sees the old file or the new one, never a part; with `fsync` that holds after
  a power cut too, and the new one is there when it returns;
- a folder that `make_folders` made, and what `sync_tree` went through, is there after a power cut;
- `take_lock` excludes other processes or says why it cannot, and which mount option is missing;
- `share` gives a file that a library wrote for its owner alone the permissions of any new file;
- an error that the file system answers with (EIO, ESTALE, EACCES, ETIMEDOUT, ...) never passes for a
  file that is missing or damaged: `patiently` tries again, a bounded number of times, then refuses.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rlhf_cluster.errors import RlhfError, StalledError, StorageError

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of `patiently`."""
_OF_NAMES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def passing(error: BaseException) -> BaseException | None:
    """The error of the storage that caused `error`; None where what was read is missing or damaged."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, StalledError):
        if isinstance(cause, StorageError):
            return cause.__cause__ or cause
        if isinstance(cause, OSError):
            return None if cause.errno in _OF_NAMES else cause
        cause = cause.__cause__
    return None


def patiently(
    read: Callable[[], T],
    what: object,
    cure: str,
    sleep: Callable[[float], None] = time.sleep,
    pauses: Sequence[float] = PAUSES,
) -> T:
    """What `read` returns; tried again after each of `pauses` while the storage answers with an error.

    Raises `StorageError`, which names `what`, in the end; at once what else `read` raises.
    """
    for pause in (*pauses, None):
        try:
            return read()
        except (OSError, RlhfError) as error:
            cause = passing(error)
            if cause is None:
                raise
            if pause is None:
                where = "" if isinstance(error, OSError) else f" ({error})"
                raise StorageError(
                    f"{what}: cannot be read, {type(cause).__name__}: {cause}{where}, in "
                    f"{len(pauses) + 1} tries over {sum(pauses):g} s. It may be whole, so nothing "
                    f"older takes its place. Mend the storage and give the same command again. {cure}"
                ) from error
        sleep(pause)
    raise AssertionError("the last try returns or raises")


def take_lock(
    fd: int,
    path: Path,
    shared: bool = False,
    flock: Callable[[int, int], None] = fcntl.flock,
) -> bool:
    """Whether the lock of the open file `fd` at `path` was taken now; it ends with the file.

    Raises `StorageError` on a file system that has no locks between processes.
    """
    try:
        flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be locked, {type(error).__name__}: {error}. This file system has no locks "
            "between processes, which keep a second run out of the same folder. Mount it with them "
            "(Lustre: -o flock; NFS: without nolock, and with its lock service running), or give "
            "run.root a folder on another one"
        ) from error
    return True


def share(path: Path) -> None:
    """Give the file the permissions that the umask leaves a new one. Raises `OSError`."""
    probe = path.with_name(f".{path.name}.mode")
    probe.unlink(missing_ok=True)
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


def write_whole(path: Path, data: bytes, fsync: bool = False) -> None:
    """Replace the file at `path` by `data`. One writer at a time. Raises `OSError`."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(data)
        if fsync:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
    if fsync:
        sync_folder(path.parent)


def make_folders(path: Path) -> None:
    """Make `path` and all folders above it, each durable in its parent. Raises `OSError`."""
    if path.is_dir():
        return
    make_folders(path.parent)
    path.mkdir(exist_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """`sync_folder` of `root` and of every folder below it, the innermost first."""
    for folder, _, _ in os.walk(root, topdown=False):
        sync_folder(Path(folder))
