"""Which learner may publish into a store: that of the newest attempt, and no other.

A learner that was given up may live on, cut off from its driver, with a commit under way; so may a
whole run whose directory another one took, on a file system whose locks do not reach other nodes. So
every attempt takes a number, one higher than the last, and a token of its own (`begin`), and shows both
under the store's lock whenever it makes a version visible (`check`).

Promises:
- once `begin` has returned, nothing of an earlier attempt becomes visible, whatever it has under way;
- two that begin at once have different tokens, and one of them is refused;
- a store that no attempt has begun in takes versions from whoever shows nothing.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from rlhf_cluster.errors import FencedError, WeightError
from rlhf_cluster.util.json_files import write_json

NAME = "writer.json"


@dataclass(frozen=True, slots=True)
class Writer:
    """What an attempt shows. Attempts count from 1."""

    attempt: int
    token: str


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
    """Raises `FencedError` unless `writer` is who publishes. The caller holds the store's lock."""
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
