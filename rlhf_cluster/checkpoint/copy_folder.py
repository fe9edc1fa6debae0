"""Checkpoints of one run in a storage that fsspec can write.

    <checkpoint.copy_to>/<run.name>/step-000050/ ...           files by their names
                                                 copied.json   written last: every file, with its hash
                              step-000075/ ...                 of a timeline that the run left:
                                                 set_aside.json in the place of copied.json

Promises:
- a copy counts only with `copied.json`, which goes first when a copy is removed or replaced;
- what is read back has the hashes that were written, and names that stay below its folder;
- whatever the storage raises becomes a `CheckpointError` without the credentials of the URL: a
  `StorageError`, unless it says that there is no such file, or what is read makes no sense.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from rlhf_cluster.checkpoint import folder
from rlhf_cluster.checkpoint.folder import Checkpoint
from rlhf_cluster.environment import without_credentials
from rlhf_cluster.errors import CheckpointError, RlhfError, StorageError
from rlhf_cluster.weights.transport import Deadline

MARKER = "copied.json"
ASIDE_MARKER = "set_aside.json"
CHECKPOINT, RECORD, REFERENCE = "checkpoint", "record", "reference"
_CHUNK_BYTES = 8 << 20


class CopyFolder:
    """The copies of one run below a URL. Serves one thread at a time."""

    def __init__(self, url: str, run_name: str) -> None:
        """Raises `CheckpointError` for a storage that cannot be opened."""
        import fsspec.core

        self.shown = f"{without_credentials(url).rstrip('/')}/{run_name}"
        with self._told("open"):
            fs, path = fsspec.core.url_to_fs(url)
        self._fs: Any = fs
        self._root = f"{str(path).rstrip('/')}/{run_name}"

    def steps(self) -> list[int]:
        """The steps that have a copy, complete or not, in order. Raises `CheckpointError`."""
        with self._told("list"):
            self._fs.invalidate_cache()
            try:
                names = [
                    entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, False)
                ]
            except FileNotFoundError:
                return []
        return sorted(folder.step_of(name) for name in names if folder.is_name(name))

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether the copy of this very checkpoint is complete. Raises `StorageError`."""
        try:
            files = self._marker(checkpoint.state.step)
        except StorageError:
            raise  # it may be whole, and is not replaced
        except CheckpointError:  # damaged: it is put there anew
            return False
        own = (checkpoint.folder / folder.MARKER).read_bytes()
        entry = {"bytes": len(own), "hash": xxh3_128_hexdigest(own)}
        return files is not None and files.get(f"{CHECKPOINT}/{folder.MARKER}") == entry

    def is_complete(self, step: int) -> bool:
        """Whether there is a marker. Raises `CheckpointError`."""
        return self._marker(step) is not None

    def num_bytes(self, step: int) -> int:
        """What is to be read of a copy, 0 where it is not complete. Raises `CheckpointError`."""
        with self._told(f"read step {step} from"):
            return sum(entry["bytes"] for entry in (self._marker(step) or {}).values())

    def put(self, step: int, files: Mapping[str, Path], deadline: Deadline) -> None:
        """Copy `files`, by name, as the copy of `step`. Raises `CheckpointError`, `StalledError`; what
        a storage that is full has of it by then is removed again, or it would stay full."""
        self.remove(step)
        try:
            self._put(step, files, deadline)
        except StorageError:
            with suppress(CheckpointError):
                self.remove(step)
            raise

    def _put(self, step: int, files: Mapping[str, Path], deadline: Deadline) -> None:
        entries = {}
        with self._told(f"write step {step} to"):
            for name, path in files.items():
                target = self._path(step, name)
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                with path.open("rb") as source, self._fs.open(target, "wb") as out:
                    entries[name] = _pump(source, out, deadline)
            deadline.left_s("its marker")
            text = json.dumps({"files": entries}, indent=1) + "\n"
            self._fs.pipe_file(self._path(step, MARKER), text.encode())

    def remove(self, step: int) -> None:
        """Remove what there is of the copy of `step`, its marker first. Raises `CheckpointError`."""
        with self._told(f"remove step {step} from"):
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(step, MARKER))
            with suppress(FileNotFoundError):
                self._fs.rm(self._path(step, ""), recursive=True)

    def set_aside(self, step: int) -> None:
        """The copy of `step` counts no more, and all of its files stay. Raises `CheckpointError`."""
        with self._told(f"set aside step {step} in"), suppress(FileNotFoundError):
            self._fs.mv(self._path(step, MARKER), self._path(step, ASIDE_MARKER))

    def get(self, step: int, target: Path, deadline: Deadline) -> None:
        """Write the files of the copy of `step` below `target`, a folder that is there.

        Raises `CheckpointError`: no complete copy, or damaged; `StalledError`.
        """
        files = self._marker(step)
        if files is None:
            raise CheckpointError(f"{self.shown}: the copy of step {step} is not complete")
        with self._told(f"read step {step} from"):
            for name, entry in files.items():
                if not folder.is_plain(name):
                    raise CheckpointError(
                        f"{self.shown}: step {step} names the file {name!r}; damaged"
                    )
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._fs.open(self._path(step, name), "rb") as source, path.open("wb") as out:
                    found = _pump(source, out, deadline)
                    folder.flush(out)
                if found != entry:
                    raise CheckpointError(
                        f"{self.shown}: {name} of step {step} is {found}, expected {entry}; damaged"
                    )

    def _marker(self, step: int) -> dict[str, Any] | None:
        """The files that a copy consists of; None when it is not complete."""
        with self._told(f"read step {step} from"):
            try:
                return dict(json.loads(self._fs.cat_file(self._path(step, MARKER)))["files"])
            except FileNotFoundError:
                return None

    def _path(self, step: int, name: str) -> str:
        return f"{self._root}/{folder.name_of(step)}/{name}".rstrip("/")

    def _told(self, what: str) -> Told:
        return Told(f"cannot {what} {self.shown}")


@dataclass(frozen=True, slots=True)
class Told:
    """Turns whatever a storage raises into a `CheckpointError` without credentials."""

    what: str

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, RlhfError):
            text = without_credentials(f"{type(error).__name__}: {error}")
            damaged = isinstance(error, FileNotFoundError | ValueError | LookupError | TypeError)
            raise (CheckpointError if damaged else StorageError)(f"{self.what} ({text})") from error


def _pump(source: Any, out: Any, deadline: Deadline) -> dict[str, int | str]:
    """Copy all of `source`; its length and hash."""
    hashed, num_bytes = xxh3_128(), 0
    while chunk := source.read(_CHUNK_BYTES):
        deadline.left_s("its files")
        out.write(chunk)
        hashed.update(chunk)
        num_bytes += len(chunk)
    return {"bytes": num_bytes, "hash": hashed.hexdigest()}
