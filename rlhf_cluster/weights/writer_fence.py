"""Which attempt of a run may make something visible: the newest, and no other.

A learner that was given up may live on, cut off from its driver, with a commit under way; so may a
thread of the driver that a disk holds, and a whole run whose directory another one took, on a file
system whose locks do not reach other nodes. So every attempt takes a number, one higher than the last,
and a token of its own (`next_writer`). Both are in the folder of the run's weights; whoever makes a
version, a reference or a checkpoint of the run visible shows them right before, under that folder's
lock (`check`, `publishing`).

Promises:
- once an attempt has its number, nothing of an earlier one becomes visible, whatever it has under way;
- two that begin at once have different tokens, and one of them is refused;
- a store that no attempt has begun in takes versions from whoever shows nothing.
"""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_cluster.errors import FencedError, StalledError, WeightError
from rlhf_cluster.util.durable_files import take_lock
from rlhf_cluster.util.json_files import write_json
from rlhf_cluster.util.slow_disk import check_wanted

NAME = "writer.json"
LOCK_TIMEOUT_S = 120.0
"""For the lock of a store: an NFSv4 server keeps that of a client that died for its lease, 90 s by
default, and gives it away some seconds later."""
_LOCK = ".commit.lock"
_LOCK_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Writer:
    """What an attempt shows. Attempts count from 1."""

    attempt: int
    token: str


@contextmanager
def commit_lock(root: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Waits for: other commits. Unblocked by: their end, or the death of their process."""
    try:
        fd = os.open(root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise WeightError(
            f"{root / _LOCK}: cannot be opened ({error}). Look at that disk"
        ) from error
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            if take_lock(fd, root / _LOCK):
                break
            check_wanted(root)
            if time.monotonic() >= deadline:
                raise StalledError(
                    f"{root / _LOCK}: another commit has held the lock for {timeout_s:g} s. Is a "
                    "second run publishing into this folder?"
                )
            time.sleep(_LOCK_POLL_S)
        yield
    finally:
        os.close(fd)


@contextmanager
def publishing(
    root: str | Path, writer: Writer | None, timeout_s: float = LOCK_TIMEOUT_S
) -> Iterator[None]:
    """Hold the lock of the store `root` in which `writer` is who publishes: for what becomes visible
    elsewhere. Raises `FencedError`, `StalledError`, `WeightError`."""
    root = Path(root).absolute()
    with commit_lock(root, timeout_s):
        check(root, writer)
        yield


def next_writer(root: Path) -> Writer:
    """Write down who publishes from now on. The caller holds the store's lock. Raises `WeightError`."""
    last = _read(root)
    writer = Writer(attempt=1 if last is None else last.attempt + 1, token=uuid.uuid4().hex)
    try:
        write_json(root / NAME, asdict(writer), fsync=True)
    except OSError as error:
        raise WeightError(f"{root / NAME}: cannot be written ({error})") from error
    return writer


def check(root: Path, writer: Writer | None) -> None:
    """Raises `FencedError` unless `writer` is who publishes, and `StalledError` in a call that was
    given up. The caller holds the store's lock."""
    check_wanted(root)
    last = _read(root)
    if last != writer:
        ours = "none" if writer is None else f"attempt {writer.attempt}"
        theirs = "none" if last is None else f"attempt {last.attempt}"
        raise FencedError(
            f"{root / NAME}: {theirs} publishes here, and this is {ours}: another learner took over. "
            "Where no other run was started, see that the file system locks files between nodes"
        )


def _read(root: Path) -> Writer | None:
    path = root / NAME
    try:
        found = json.loads(path.read_bytes())
        return Writer(attempt=int(found["attempt"]), token=str(found["token"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightError(
            f"{path}: who publishes cannot be read ({type(error).__name__}: {error}). Look at that "
            "disk; a file that is damaged for good may be deleted while no run uses the folder"
        ) from error
