"""The folder of a node's copies: made here, marked, and removed only with its mark.

    <weights.mirror>/rlhf_mirror_<user and store>/     .mark   .lock   v000001/   v000002/

Whoever reads the copies holds a shared lock of the mark; a folder whose mark nobody holds is of a run
that has ended.

Promises:
- nothing but a folder that this user's processes made, with the name and the mark of one, is ever
  removed; what else is in `weights.mirror` may have any name;
- the folder belongs to one store: two runs of one name that write to different stores never meet;
- a folder has its name only together with its mark, and loses both at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import stat
from pathlib import Path

from rlhf_cluster.errors import StorageError
from rlhf_cluster.util.durable_files import take_lock

MARK = ".mark"
_NAME = re.compile(r"rlhf_mirror_[0-9a-f]{16}(\.[0-9a-f]{8})?")
"""With a suffix while it is made or removed."""
_FLAGS = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW


def copies_of(root: str | Path, mirror: str | Path) -> Path:
    """Return the folder below `mirror` in which this user's processes keep copies of store `root`."""
    key = f"{os.geteuid()} {Path(root).absolute()}"
    return Path(mirror).absolute() / f"rlhf_mirror_{hashlib.sha256(key.encode()).hexdigest()[:16]}"


def begin_use(local: Path) -> int | None:
    """Make the folder if there is none. Return its mark, open: no `sweep` removes the folder until it
    is closed. None: another process makes or removes it at this moment; ask again.

    Raises `FileExistsError` where the name is taken by something else; `OSError`, `StorageError`.
    """
    local.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(local):
        return _make(local)
    if not _is_ours(local):
        if not os.path.lexists(local):
            return None
        raise FileExistsError(
            f"{local} exists, and is no folder that this user's runs made there ({MARK} is missing or "
            "another user's). Move it away, or give weights.mirror another folder"
        )
    try:
        fd = os.open(local / MARK, _FLAGS)
    except FileNotFoundError:
        return None
    return _locked(fd, local)


def is_in_use(fd: int, local: Path) -> bool:
    """Return whether `fd`, of `begin_use`, is still the mark of what has the name `local`."""
    try:
        found = os.lstat(local / MARK)
    except OSError:
        return False
    return os.path.samestat(found, os.fstat(fd))


def sweep(mirror: Path) -> None:
    """Remove the folders of copies below `mirror` that no process of this node uses."""
    for folder in sorted(mirror.glob("rlhf_mirror_*")):
        if _NAME.fullmatch(folder.name) and _is_ours(folder):
            with contextlib.suppress(OSError, StorageError):
                _remove_unused(folder)


def _remove_unused(folder: Path) -> None:
    fd = os.open(folder / MARK, _FLAGS)
    try:
        if take_lock(fd, folder / MARK) and is_in_use(fd, folder):
            doomed = folder
            if not folder.suffix:
                doomed = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}")
                folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    finally:
        os.close(fd)


def _make(local: Path) -> int | None:
    fresh = local.with_name(f"{local.name}.{secrets.token_hex(4)}")
    fresh.mkdir(mode=0o700)
    fd = None
    try:
        fd = _locked(os.open(fresh / MARK, _FLAGS | os.O_CREAT | os.O_EXCL, 0o600), fresh)
        if fd is not None:
            fresh.rename(local)
    except OSError:
        if fd is not None:
            os.close(fd)
        shutil.rmtree(fresh, ignore_errors=True)
        if os.path.lexists(local):  # another process was first
            return None
        raise
    return fd


def _locked(fd: int, folder: Path) -> int | None:
    """`fd` with a shared lock; None, and closed, where a sweep was first."""
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
