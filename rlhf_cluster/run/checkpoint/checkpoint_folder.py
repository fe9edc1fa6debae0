"""The folder of a run's checkpoints: which are complete, which are valid, which are removed.

    checkpoints/step-000050/          complete, never changed again
                  learner/v000050/    weights and moments, a version in the weight store's format
                  run.json            the run's state
                  complete.json       written last: every file's size, and all hashes but the shards'
    checkpoints/step-000100.5f3a90b1.partial/  being written, or left by a process that died
    checkpoints/damaged-0000-step-000075/  skipped by a run that resumed from an earlier one

Promises:
- a checkpoint is valid only with its marker, and with every file as the marker describes it. `newest`
  returns the last valid one, and says what is wrong with those that it skipped;
- an error of the storage means neither damage nor absence: `newest` tries again, then refuses, and
  returns no older checkpoint instead;
- a checkpoint that is skipped is renamed, and the last `MAX_ASIDE` of them are kept;
- `verify_tensors` reads all of the learner's tensors and compares their hashes;
- the marker is on disk before the folder gets its name. A name without `.partial` therefore belongs to
  a complete checkpoint whenever any process, or the machine, stops;
- an attempt of the run that was abandoned, and a call past its deadline, complete no checkpoint;
- an older checkpoint is removed only after a newer one is complete. It is either intact or deleted. The
  one with the best score can be kept in addition to the newest;
- names of files in the marker are plain names below the folder: nothing outside is read.

The marker holds only the size of a shard. A change that keeps the size is detected by the tensors'
hashes.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from xxhash import xxh3_128_hexdigest

from rlhf_cluster.errors import CheckpointError, StalledError, StorageError, WeightError
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.util.durable_files import (
    PAUSES,
    find_storage_cause,
    make_folders,
    remove_folder,
    run_with_retries,
    sync_file,
    sync_folder,
    sync_tree,
)
from rlhf_cluster.util.slow_disk import check_not_abandoned
from rlhf_cluster.weights.read_version import verify
from rlhf_cluster.weights.transports.transport import Deadline

log = logging.getLogger(__name__)

MARKER = "complete.json"
STATE = "run.json"
LEARNER = "learner"
SHARD = ".safetensors"
SPARE_BYTES = 1 << 20  # for everything except the learner's tensors
Fence = Callable[[], AbstractContextManager[None]]
"""Context held while a checkpoint gets its name.

It raises if this attempt may no longer complete one.
"""
ASIDE = "damaged-"
MAX_ASIDE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint. `learner` is the folder of its version."""

    folder: Path
    state: RunState

    @property
    def learner(self) -> Path:
        return self.folder / LEARNER / f"v{self.state.step:06d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The newest valid checkpoint, and what is wrong with newer ones."""

    checkpoint: Checkpoint | None
    damaged: list[str] = field(default_factory=list)
    origin: str = ""  # where it was fetched from, if it was not in the folder


def begin(
    root: Path,
    step: int,
    num_bytes: int,
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> Path:
    """Create an empty folder for checkpoint `step`, with space for `num_bytes` of tensors.

    Leftovers of earlier tries and removals are deleted first. Raises `StorageError` if there is no
    space, or the folder cannot be created.
    """
    try:
        make_folders(root)
        check_not_abandoned(root)  # an abandoned call would delete files of the try after it
        for leftover in [*root.glob("*.partial"), *root.glob("*.trash")]:
            shutil.rmtree(leftover)
        free, needed = free_bytes(root), num_bytes + SPARE_BYTES
        if needed > free:
            aside = ", ".join(path.name for path in _aside(root))
            raise StorageError(
                f"{root}: a checkpoint needs {needed} bytes and {free} are free. Free space, or keep "
                "fewer with checkpoint.keep" + f". These are kept aside: {aside}" * bool(aside)
            )
        # A unique name: an abandoned rank may still write into the folder of an earlier try.
        partial = root / f"{name_of(step)}.{uuid.uuid4().hex[:8]}.partial"
        partial.mkdir()
        return partial
    except OSError as error:
        raise StorageError(f"{root}: cannot make a checkpoint there ({error})") from error


def complete(partial: Path, state: RunState, fence: Fence = nullcontext) -> Checkpoint:
    """Make the files in `partial` the checkpoint of `state`.

    Raises `CheckpointError`, and what `fence` raises.
    """
    final = partial.with_name(name_of(state.step))
    try:
        _write(partial / STATE, state.to_json())
        names = sorted(
            str(PurePosixPath(path.relative_to(partial)))
            for path in partial.rglob("*")
            if path.is_file()
        )
        files = {name: _describe(partial / name, not name.endswith(SHARD)) for name in names}
        _write(partial / MARKER, json.dumps({"files": files}, indent=1) + "\n")
        adopt(partial, final, fence)
    except StalledError:  # every TimeoutError is an OSError too
        raise
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot write the checkpoint ({error})") from error
    return Checkpoint(folder=final, state=state)


def adopt(source: Path, final: Path, fence: Fence = nullcontext) -> None:
    """Rename `source`, which holds all files of a checkpoint, to `final`.

    A checkpoint with that name is renamed before. Raises `OSError`, and what `fence` raises.
    """
    sync_tree(source)
    with fence():
        check_not_abandoned(final)
        if final.exists():
            _set_aside(final)
        source.rename(final)
    sync_folder(final.parent)


def check(folder: Path) -> Checkpoint:
    """Return the checkpoint in `folder`.

    Raises `CheckpointError` unless every file is as the marker says, and `StorageError` when that
    cannot be determined.
    """
    checkpoint = read(folder)
    if folder.name != name_of(checkpoint.state.step):
        step = checkpoint.state.step
        raise CheckpointError(f"{folder / MARKER}: does not belong to step {step}; damaged")
    return checkpoint


def read(folder: Path) -> Checkpoint:
    """Return what `check` does, whatever the name of `folder`."""
    try:
        files = json.loads((folder / MARKER).read_bytes())["files"]
        for name, entry in files.items():
            if not is_plain(name):
                raise CheckpointError(f"{folder / MARKER}: names the file {name!r}; damaged")
            found = _describe(folder / name, with_hash="hash" in entry)
            if found != entry:
                raise CheckpointError(f"{folder / name}: is {found}, expected {entry}; damaged")
        text = (folder / STATE).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: missing; the checkpoint is not complete"
        ) from error
    except OSError as error:
        if find_storage_cause(error):
            raise StorageError(f"{folder}: cannot be read ({error!r})") from error
        raise CheckpointError(f"{folder}: cannot be read ({error!r}); damaged") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error!r}); damaged") from error
    if STATE not in files:
        raise CheckpointError(f"{folder / MARKER}: does not name {STATE}; damaged")
    return Checkpoint(folder=folder, state=RunState.from_json(text, str(folder / STATE)))


def newest(
    root: Path,
    also: Callable[[Checkpoint], None] = lambda checkpoint: None,
    sleep: Callable[[float], None] = time.sleep,
    pauses: Sequence[float] = PAUSES,
) -> Found:
    """Return the newest valid checkpoint. Changes nothing.

    A checkpoint for which `also` raises a `CheckpointError` or a `WeightError` is skipped as well.
    Raises `StorageError` for one whose validity cannot be determined, after one more try for each of
    `pauses`.
    """

    def look(folder: Path) -> Checkpoint:
        checkpoint = check(folder)
        also(checkpoint)
        return checkpoint

    damaged = []
    for folder in reversed(run_with_retries(lambda: _all(root), root, "", sleep, pauses)):
        try:
            checkpoint = run_with_retries(
                lambda path=folder: look(path), folder, CURE, sleep, pauses
            )
            return Found(checkpoint=checkpoint, damaged=damaged)
        except StorageError:
            raise
        except (CheckpointError, WeightError) as error:
            damaged.append(f"{folder}: {str(error).removeprefix(f'{folder}: ')}")
    return Found(checkpoint=None, damaged=damaged)


CURE = (
    "A file that is lost for good may be deleted: its checkpoint is then treated as damaged, and a "
    "copy at checkpoint.copy_to, or the checkpoint before it, is taken"
)


def verify_tensors(checkpoint: Checkpoint, deadline: Deadline | None = None) -> None:
    """Read and verify all tensors that the learner would load.

    Raises `WeightError`, `StalledError`.
    """
    verify(checkpoint.learner, deadline=deadline)


def retain(root: Path, keep: int, keep_best: int = 0) -> list[RunState]:
    """Delete all but the newest `keep` checkpoints; return the states of the rest in order.

    With `keep_best` 1 the one of all with the best score stays too. Raises `CheckpointError` for one
    that cannot be read or deleted. Raises `StorageError`, and deletes nothing, when it cannot be
    determined which is the best.
    """
    folders = _all(root)
    kept = set(folders[-keep:])
    try:
        if keep_best:
            kept |= {path for path in [_best(folders)] if path is not None}
        for folder in folders:
            if folder not in kept:
                remove_folder(folder)
        texts = {path: (path / STATE).read_bytes() for path in folders if path in kept}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot remove older checkpoints ({error})") from error
    return [RunState.from_json(text, str(path / STATE)) for path, text in texts.items()]


def _best(folders: list[Path]) -> Path | None:
    """Return the one with the highest score, the last of equals. An invalid one has no score."""
    scores: dict[Path, float] = {}
    for folder in folders:
        try:
            score = check(folder).state.score
        except StorageError:
            raise
        except CheckpointError:
            continue
        if score is not None and math.isfinite(score):
            scores[folder] = score
    return max(reversed(list(scores)), key=lambda path: scores[path], default=None)


def set_aside_after(root: Path, step: int) -> None:
    """Rename checkpoints after `step`: a run resumes from `step` and will write its own.

    Partially written ones are removed.
    """
    for partial in root.glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for folder in _all(root):
        if step_of(folder.name) > step:
            _set_aside(folder)


def steps(root: Path) -> list[int]:
    """Return the steps that have a checkpoint, valid or not, in order."""
    return [step_of(path.name) for path in _all(root)]


def name_of(step: int) -> str:
    return f"step-{step:06d}"


def is_name(name: str) -> bool:
    return re.fullmatch(r"step-\d{6,}", name) is not None


def step_of(name: str) -> int:
    return int(name.removeprefix("step-"))


def is_plain(name: str) -> bool:
    """Whether a name that was read leads to a file below the folder it was read in."""
    plain = re.fullmatch(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*", name)
    return plain is not None and ".." not in name


def _all(root: Path) -> list[Path]:
    """Return the folders that have a checkpoint's name, by step."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    return [root / name for name in sorted(filter(is_name, names), key=step_of)]


def _aside(root: Path) -> list[Path]:
    """Return the renamed folders in the order of renaming."""
    return sorted(root.glob(f"{ASIDE}*-step-*"))


def _set_aside(folder: Path) -> None:
    """Rename a checkpoint that is skipped. The last `MAX_ASIDE` of all renamed ones stay."""
    before = _aside(folder.parent)
    number = 1 + int(before[-1].name.removeprefix(ASIDE)[:4]) if before else 0
    aside = folder.with_name(f"{ASIDE}{number:04d}-{folder.name}")
    folder.rename(aside)
    log.warning("%s is skipped, and kept as %s", folder, aside.name)
    for path in [*before, aside][:-MAX_ASIDE]:
        shutil.rmtree(path, ignore_errors=True)


def _describe(path: Path, with_hash: bool) -> dict[str, int | str]:
    num_bytes = path.stat().st_size
    if not with_hash:
        return {"bytes": num_bytes}
    return {"bytes": num_bytes, "hash": xxh3_128_hexdigest(path.read_bytes())}


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        sync_file(file)
