"""Fencing: only the newest attempt of a run may make something visible.

Work of an earlier attempt can survive it:
- a learner that its driver replaced may live on, cut off from the driver, with a commit in progress;
- a thread of the driver may hang in a disk, and finish later;
- a whole run may continue after another one took its directory, on a file system whose locks do not
  reach other nodes.

So every attempt takes a number, one higher than the last, and a unique token (`next_writer`). Both are
in the folder of the run's weights. A process shows them right before it makes a version, a reference
or a checkpoint of the run visible, under that folder's lock (`check`, `publishing`).

Promises:
- Once an attempt has its number, nothing of an earlier one becomes visible, whatever is in progress.
- Two attempts that begin at once have different tokens, and one of them is refused.
- A store in which no attempt has begun takes versions from a process that shows no number and token.
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
from rlhf_cluster.util.durable_files import take_lock, write_json
from rlhf_cluster.util.slow_disk import check_not_abandoned

NAME = "writer.json"
LOCK_TIMEOUT_S = 120.0
"""Seconds to wait for the lock of a store.

An NFSv4 server keeps the lock of a dead client for its lease, 90 s by default, and grants it to
another client some seconds later.
"""
_LOCK = ".commit.lock"
_LOCK_POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Writer:
    """Number and token of an attempt, which it shows to publish. Attempts count from 1."""

    attempt: int
    token: str


@contextmanager
def commit_lock(root: Path, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the lock of the store `root` inside the block.

    Waits for: other commits. Unblocked by: their end, or the death of their process. Raises
    `StalledError` after `timeout_s`, `WeightError`.
    """
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
            check_not_abandoned(root)
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
    """Hold the lock of the store `root` while `writer` makes something visible elsewhere.

    Raises `FencedError` unless `writer` is the attempt that publishes in the store; `StalledError`,
    `WeightError`.
    """
    root = Path(root).absolute()
    with commit_lock(root, timeout_s):
        check(root, writer)
        yield


def next_writer(root: Path) -> Writer:
    """Make a new attempt the one that publishes, and return it. The caller holds the store's lock.

    Raises `WeightError`.
    """
    last = _read(root)
    writer = Writer(attempt=1 if last is None else last.attempt + 1, token=uuid.uuid4().hex)
    try:
        write_json(root / NAME, asdict(writer), fsync=True)
    except OSError as error:
        raise WeightError(f"{root / NAME}: cannot be written ({error})") from error
    return writer


def check(root: Path, writer: Writer | None) -> None:
    """Check that `writer` is the attempt that publishes. The caller holds the store's lock.

    Raises `FencedError` where it is not, and `StalledError` in a call whose caller has timed out.
    """
    check_not_abandoned(root)
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
