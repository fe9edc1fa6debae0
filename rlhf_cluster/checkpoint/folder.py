"""The folder of a run's checkpoints: what is whole, what counts, what goes.

    checkpoints/step-000050/          complete, never changed again
                  learner/v000050/    weights and moments, a version in the weight store's format
                  run.json            the run's state
                  complete.json       written last: every file's size, and the small ones' hashes
    checkpoints/step-000100.partial/  being written, or left by a process that died

Promises:
- a checkpoint counts only with its marker, and with every file that the marker names as it names it;
  `newest` takes the last one that does, and says what is wrong with those it passed over;
- the marker is on the disk before the folder gets its name, so a name without `.partial` stands for a
  whole checkpoint whenever any process, or the machine, stops;
- an older checkpoint is removed only after a newer one is complete, and is whole or gone;
- names of files come from the marker as plain names below the folder: nothing outside is read.

A file that changed without changing its size is found when it is read: every tensor is verified.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from xxhash import xxh3_128_hexdigest

from rlhf_cluster.checkpoint.state import RunState
from rlhf_cluster.errors import CheckpointError

MARKER = "complete.json"
STATE = "run.json"
LEARNER = "learner"
SMALL_BYTES = 1 << 20
SPARE_BYTES = 1 << 20  # for everything beside the learner's tensors


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
    """The newest complete checkpoint, and what is wrong with newer ones."""

    checkpoint: Checkpoint | None
    damaged: list[str] = field(default_factory=list)


def begin(
    root: Path,
    step: int,
    num_bytes: int,
    free_bytes: Callable[[Path], int] = lambda folder: shutil.disk_usage(folder).free,
) -> Path:
    """An empty folder for checkpoint `step`, with room for `num_bytes` of tensors.

    What earlier tries and removals left is deleted first. Raises `CheckpointError`: no space, no
    folder.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in [*root.glob("*.partial"), *root.glob("*.trash")]:
            shutil.rmtree(leftover)
        free, needed = free_bytes(root), num_bytes + SPARE_BYTES
        if needed > free:
            raise CheckpointError(
                f"{root}: a checkpoint needs {needed} bytes and {free} are free. Free space, or keep "
                "fewer with checkpoint.keep"
            )
        partial = _folder(root, step).with_suffix(".partial")
        partial.mkdir()
        return partial
    except OSError as error:
        raise CheckpointError(f"{root}: cannot make a checkpoint there ({error})") from error


def complete(partial: Path, state: RunState) -> Checkpoint:
    """Make what lies in `partial` the checkpoint of `state`. Raises `CheckpointError`."""
    final = partial.with_suffix("")
    try:
        _write(partial / STATE, state.to_json())
        names = sorted(
            str(PurePosixPath(path.relative_to(partial)))
            for path in partial.rglob("*")
            if path.is_file()
        )
        files = {name: _describe(partial / name) for name in names}
        _write(partial / MARKER, json.dumps({"files": files}, indent=1) + "\n")
        _sync(partial)
        if final.exists():
            _remove(final)
        partial.rename(final)
        _sync(final.parent)
    except OSError as error:
        raise CheckpointError(f"{partial}: cannot write the checkpoint ({error})") from error
    return Checkpoint(folder=final, state=state)


def check(folder: Path) -> Checkpoint:
    """The checkpoint in `folder`. Raises `CheckpointError` unless every file is as the marker says."""
    try:
        files = json.loads((folder / MARKER).read_bytes())["files"]
        for name, entry in files.items():
            if not re.fullmatch(r"[A-Za-z0-9_.\-]+(/[A-Za-z0-9_.\-]+)*", name) or ".." in name:
                raise CheckpointError(f"{folder / MARKER}: names the file {name!r}; damaged")
            found = _describe(folder / name)
            if found != entry:
                raise CheckpointError(f"{folder / name}: is {found}, expected {entry}; damaged")
        text = (folder / STATE).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{error.filename}: missing; the checkpoint is not complete"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder}: cannot be read ({error!r}); damaged") from error
    state = RunState.from_json(text, str(folder / STATE))
    if STATE not in files or _folder(folder.parent, state.step) != folder:
        raise CheckpointError(f"{folder / MARKER}: does not belong to step {state.step}; damaged")
    return Checkpoint(folder=folder, state=state)


def newest(root: Path) -> Found:
    """The last checkpoint that is whole. Changes nothing."""
    damaged = []
    for folder in reversed(_all(root)):
        try:
            return Found(checkpoint=check(folder), damaged=damaged)
        except CheckpointError as error:
            damaged.append(str(error))
    return Found(checkpoint=None, damaged=damaged)


def retain(root: Path, keep: int) -> list[RunState]:
    """Delete all but the newest `keep` checkpoints; the states of those that stay, oldest first.

    Raises `CheckpointError` for one that cannot be read or deleted.
    """
    folders = _all(root)
    try:
        for folder in folders[:-keep]:
            _remove(folder)
        texts = {path: (path / STATE).read_bytes() for path in folders[-keep:]}
    except OSError as error:
        raise CheckpointError(f"{root}: cannot remove older checkpoints ({error})") from error
    return [RunState.from_json(text, str(path / STATE)) for path, text in texts.items()]


def remove_after(root: Path, step: int) -> None:
    """Delete checkpoints of later steps: a run goes on from `step` and will write its own."""
    for folder in _all(root):
        if _step(folder) > step:
            _remove(folder)


def _folder(root: Path, step: int) -> Path:
    return root / f"step-{step:06d}"


def _all(root: Path) -> list[Path]:
    """The folders that have a checkpoint's name, by step."""
    if not root.is_dir():
        return []
    found = [path for path in root.iterdir() if re.fullmatch(r"step-\d{6,}", path.name)]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


def _describe(path: Path) -> dict[str, int | str]:
    num_bytes = path.stat().st_size
    if num_bytes > SMALL_BYTES:
        return {"bytes": num_bytes}
    return {"bytes": num_bytes, "hash": xxh3_128_hexdigest(path.read_bytes())}


def _remove(folder: Path) -> None:
    # Renamed first: a checkpoint is whole or gone, also while its files are being deleted.
    trash = folder.with_suffix(".trash")
    shutil.rmtree(trash, ignore_errors=True)
    folder.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
