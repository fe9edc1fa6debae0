"""Files and folders that appear and vanish whole, and retries after transient errors of a storage.

Promises:
- `write_atomically`, `write_all`, `write_json`: a reader sees the old file or the new one, never a
  part. With `fsync` this holds after a power cut too, and the new file is on disk when the call
  returns;
- no secret of this process is in a file of `write_json`;
- a folder of `make_whole_folder` appears when all its files are written, and one of `remove_folder`
  vanishes before any of them is deleted;
- folders that `make_folders` made, and entries of the folders below `sync_tree`'s root, survive a power
  cut;
- `take_lock` excludes other processes, or raises an error that names the missing mount option;
- `apply_umask` gives a file that a library made readable by its owner alone the permissions of a new
file;
- an error of the file system (EIO, ESTALE, EACCES, ETIMEDOUT, ...) is never treated as a missing or
  damaged file: `run_with_retries` tries again a bounded number of times, then raises `StorageError`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from rlhf_cluster.errors import RlhfError, StalledError, StorageError
from rlhf_cluster.util import provenance

T = TypeVar("T")

PAUSES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds between tries of `run_with_retries`."""

# errors that mean that the path does not exist, rather than that the storage fails
_OF_NAMES = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG}


def find_storage_cause(error: BaseException) -> BaseException | None:
    """Return the storage's error that caused `error`; None if the file is missing or damaged."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, StalledError):
        if isinstance(cause, StorageError):
            return cause.__cause__ or cause
        if isinstance(cause, OSError):
            return None if cause.errno in _OF_NAMES else cause
        cause = cause.__cause__
    return None


def run_with_retries(
    read: Callable[[], T],
    what: object,
    cure: str,
    sleep: Callable[[float], None] = time.sleep,
    pauses: Sequence[float] = PAUSES,
) -> T:
    """Call `read` and return its result; try again while the storage answers with an error.

    Args:
        read: the call. Errors other than the storage's (`find_storage_cause`) are raised at once.
        what: name of what is read, for the error.
        cure: last sentence of the error: what else the user can do.
        pauses: seconds to sleep before each further try.

    Raises:
        StorageError: the storage still answers with an error at the last try.
    """
    for pause in (*pauses, None):
        try:
            return read()
        except (OSError, RlhfError) as error:
            cause = find_storage_cause(error)
            if cause is None:
                raise
            if pause is None:
                where = "" if isinstance(error, OSError) else f" ({error})"
                raise StorageError(
                    f"{what}: cannot be read, {type(cause).__name__}: {cause}{where}, in "
                    f"{len(pauses) + 1} tries over {sum(pauses):g} s. It may be intact, so nothing "
                    f"older takes its place. Repair the storage and run the same command again. {cure}"
                ) from error
        sleep(pause)
    raise AssertionError("the last try returns or raises")


def take_lock(
    fd: int,
    path: Path,
    shared: bool = False,
    flock: Callable[[int, int], None] = fcntl.flock,
) -> bool:
    """Try to lock the open file `fd` at `path`, and return whether that succeeded.

    Closing the file releases the lock. Raises `StorageError` on a file system that has no locks
    between processes.
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


def apply_umask(path: Path) -> None:
    """Give the file the permissions that a new file has under the umask. Raises `OSError`."""
    probe = path.with_name(f".{path.name}.mode")
    probe.unlink(missing_ok=True)
    os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    mode = stat.S_IMODE(probe.stat().st_mode)
    probe.unlink()
    path.chmod(mode)


@contextmanager
def write_atomically(path: Path, fsync: bool = False, mark: str = "") -> Iterator[IO[bytes]]:
    """Open a file that replaces the one at `path` when the block ends, and is deleted at an error.

    One writer at a time, or one per `mark`. Raises `OSError`.
    """
    partial = path.with_name(f".{path.name}{mark}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if fsync:
                sync_file(file)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):  # the same disk
            partial.unlink()
        raise
    if fsync:
        sync_folder(path.parent)


def write_all(path: Path, data: bytes, fsync: bool = False) -> None:
    """Replace the file at `path` by `data`. One writer at a time. Raises `OSError`."""
    with write_atomically(path, fsync) as file:
        file.write(data)


def write_json(path: Path, value: Mapping[str, Any], fsync: bool = False) -> None:
    """Write `value` without the secrets of this process (`provenance`). Raises `OSError`."""
    text = json.dumps(provenance.redact_process_secrets(value), indent=2, default=str) + "\n"
    write_all(path, text.encode(), fsync)


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON file; None if there is no such file, or if it is not JSON.

    Raises `OSError` for any other error of the storage, as the file may exist.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def make_whole_folder(folder: Path) -> Iterator[Path]:
    """Make an empty folder that gets the name `folder` when the block ends. Raises `OSError`."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, which is missing while its files are being deleted. Raises `OSError`."""
    trash = folder.with_suffix(".trash")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def make_folders(path: Path, sync: bool = True) -> None:
    """Make `path` and all folders above it. Raises `OSError`. `sync`: they survive a power cut."""
    if path.is_dir():
        return
    make_folders(path.parent, sync)
    path.mkdir(exist_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_file(file: IO[Any]) -> None:
    """Make what was written to the open file survive a power cut."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the folder's entries survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_tree(root: Path) -> None:
    """Call `sync_folder` for `root` and every folder below it, the innermost first."""
    for folder, _, _ in os.walk(root, topdown=False):
        sync_folder(Path(folder))
