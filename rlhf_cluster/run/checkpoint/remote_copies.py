"""Second copy of every checkpoint in an fsspec storage, and the way back from it.

    <checkpoint.copy_to>/<run.name>/step-000050/ checkpoint/    the checkpoint's own files
                                                 record/        metrics.jsonl, resolved.json
                                                 reference/     the stored reference that it needs
                                                 copied.json    written last: every file with its hash
                              step-000075/ ...                  of a timeline that the run left:
                                                 set_aside.json in the place of copied.json

Promises:
- copies are written in the background, one checkpoint at a time, the newest first. A checkpoint
  that cannot be copied by its deadline is logged and counted, and costs the run nothing else;
- a copy is valid only with `copied.json`, which is deleted first if a copy is removed or replaced;
- a copy of a checkpoint that is not on disk is removed once a newer one on disk has a copy. A copy
  newer than all checkpoints on disk is of a timeline that the run left: it is marked by
  `set_aside.json`, and removed once a later step has a copy;
- fetched files have the hashes that were written, and names that stay below their folder. The
  checkpoint appears in the run directory last, and complete;
- an error of the storage, or its silence, is not treated as a damaged copy: no older one is
  fetched;
- whatever the storage raises becomes a `CheckpointError` without the credentials of the URL: a
  `StorageError`, unless the file does not exist or its content makes no sense.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128, xxh3_128_hexdigest

from rlhf_cluster.errors import (
    CheckpointError,
    RlhfError,
    RunError,
    StalledError,
    StorageError,
    WeightError,
)
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint, Found
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import read_metrics
from rlhf_cluster.util.durable_files import (
    find_storage_cause,
    make_folders,
    run_with_retries,
    sync_file,
    sync_folder,
    sync_tree,
)
from rlhf_cluster.util.provenance import remove_credentials
from rlhf_cluster.util.slow_disk import run_in_thread, run_within
from rlhf_cluster.weights import store
from rlhf_cluster.weights.read_version import verify
from rlhf_cluster.weights.transports.shared_files import version_dir
from rlhf_cluster.weights.transports.transport import Deadline

if TYPE_CHECKING:
    from rlhf_cluster.config.load import AnyConfig


MARKER = "copied.json"

ASIDE_MARKER = "set_aside.json"

CHECKPOINT, RECORD, REFERENCE = "checkpoint", "record", "reference"

_CHUNK_BYTES = 8 << 20


class CopyFolder:
    """The copies of one run below a URL. Serves one thread at a time."""

    def __init__(self, url: str, run_name: str) -> None:
        """Open the storage. Raises `CheckpointError` if that fails."""
        import fsspec.core

        self.shown = f"{remove_credentials(url).rstrip('/')}/{run_name}"
        with self.translate_errors("open"):
            fs, path = fsspec.core.url_to_fs(url)
        self._fs: Any = fs
        self._root = f"{str(path).rstrip('/')}/{run_name}"

    def steps(self) -> list[int]:
        """Return the steps that have a copy, complete or not. Raises `CheckpointError`."""
        with self.translate_errors("list"):
            self._fs.invalidate_cache()
            try:
                names = [
                    entry.rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, False)
                ]
            except FileNotFoundError:
                return []
        return sorted(
            checkpoint_folder.step_of(name) for name in names if checkpoint_folder.is_name(name)
        )

    def has(self, checkpoint: Checkpoint) -> bool:
        """Whether the copy of this very checkpoint is complete. Raises `StorageError`."""
        try:
            files = self._marker(checkpoint.state.step)
        except StorageError:
            raise  # it may be intact, and is not replaced
        except CheckpointError:  # damaged: it is written again
            return False
        own = (checkpoint.folder / checkpoint_folder.MARKER).read_bytes()
        entry = {"bytes": len(own), "hash": xxh3_128_hexdigest(own)}
        return files is not None and files.get(f"{CHECKPOINT}/{checkpoint_folder.MARKER}") == entry

    def is_complete(self, step: int) -> bool:
        """Whether there is a marker. Raises `CheckpointError`."""
        return self._marker(step) is not None

    def num_bytes(self, step: int) -> int:
        """Return the size of a copy, 0 if it is not complete. Raises `CheckpointError`."""
        with self.translate_errors(f"read step {step} from"):
            return sum(entry["bytes"] for entry in (self._marker(step) or {}).values())

    def put(self, step: int, files: Mapping[str, Path], deadline: Deadline) -> None:
        """Copy `files`, by name, as the copy of `step`. Raises `CheckpointError`, `StalledError`.

        When the storage fails, the part that was written is removed: a full storage would stay full.
        """
        self.remove(step)
        try:
            self._put(step, files, deadline)
        except StorageError:
            with suppress(CheckpointError):
                self.remove(step)
            raise

    def _put(self, step: int, files: Mapping[str, Path], deadline: Deadline) -> None:
        entries = {}
        with self.translate_errors(f"write step {step} to"):
            for name, path in files.items():
                target = self._path(step, name)
                self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
                with path.open("rb") as source, self._fs.open(target, "wb") as out:
                    entries[name] = _pump(source, out, deadline)
            deadline.left_s("its marker")
            text = json.dumps({"files": entries}, indent=1) + "\n"
            self._fs.pipe_file(self._path(step, MARKER), text.encode())

    def remove(self, step: int) -> None:
        """Remove all files of the copy of `step`, its marker first. Raises `CheckpointError`."""
        with self.translate_errors(f"remove step {step} from"):
            with suppress(FileNotFoundError):
                self._fs.rm_file(self._path(step, MARKER))
            with suppress(FileNotFoundError):
                self._fs.rm(self._path(step, ""), recursive=True)

    def set_aside(self, step: int) -> None:
        """Make the copy of `step` invalid, and keep all of its files. Raises `CheckpointError`."""
        with self.translate_errors(f"set aside step {step} in"), suppress(FileNotFoundError):
            self._fs.mv(self._path(step, MARKER), self._path(step, ASIDE_MARKER))

    def get(self, step: int, target: Path, deadline: Deadline) -> None:
        """Write the files of the copy of `step` below `target`, an existing folder.

        Raises `CheckpointError` if the copy is damaged or not complete, and `StalledError`.
        """
        files = self._marker(step)
        if files is None:
            raise CheckpointError(f"{self.shown}: the copy of step {step} is not complete")
        with self.translate_errors(f"read step {step} from"):
            for name, entry in files.items():
                if not checkpoint_folder.is_plain(name):
                    raise CheckpointError(
                        f"{self.shown}: step {step} names the file {name!r}; damaged"
                    )
                path = target / name
                path.parent.mkdir(parents=True, exist_ok=True)
                with self._fs.open(self._path(step, name), "rb") as source, path.open("wb") as out:
                    found = _pump(source, out, deadline)
                    sync_file(out)
                if found != entry:
                    raise CheckpointError(
                        f"{self.shown}: {name} of step {step} is {found}, expected {entry}; damaged"
                    )

    def _marker(self, step: int) -> dict[str, Any] | None:
        """Return the files of a copy; None when it is not complete."""
        with self.translate_errors(f"read step {step} from"):
            try:
                return dict(json.loads(self._fs.cat_file(self._path(step, MARKER)))["files"])
            except FileNotFoundError:
                return None

    def _path(self, step: int, name: str) -> str:
        return f"{self._root}/{checkpoint_folder.name_of(step)}/{name}".rstrip("/")

    @contextmanager
    def translate_errors(self, what: str) -> Iterator[None]:
        """Turn whatever a storage raises into a `CheckpointError` without credentials."""
        try:
            yield
        except RlhfError:
            raise
        except Exception as error:
            text = remove_credentials(f"{type(error).__name__}: {error}")
            damaged = isinstance(error, FileNotFoundError | ValueError | LookupError | TypeError)
            kind = CheckpointError if damaged else StorageError
            raise kind(f"cannot {what} {self.shown} ({text})") from error


def _pump(source: Any, out: Any, deadline: Deadline) -> dict[str, int | str]:
    """Copy all of `source` to `out`; return its length and hash."""
    hashed, num_bytes = xxh3_128(), 0
    while chunk := source.read(_CHUNK_BYTES):
        deadline.left_s("its files")
        out.write(chunk)
        hashed.update(chunk)
        num_bytes += len(chunk)
    return {"bytes": num_bytes, "hash": hashed.hexdigest()}


def contents(run: RunDir, checkpoint: Checkpoint) -> dict[str, Path]:
    """Return the files of a copy by their names in it."""
    found = _files(checkpoint.folder, CHECKPOINT)
    if (reference := checkpoint.state.reference) is not None:
        version = version_dir(run.reference, reference)
        found |= _files(version, f"{REFERENCE}/{version.name}")
    found |= {
        f"{RECORD}/{path.name}": path for path in (run.metrics, run.resolved) if path.exists()
    }
    return found


def _files(root: Path, prefix: str) -> dict[str, Path]:
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    return {f"{prefix}/{path.relative_to(root).as_posix()}": path for path in paths}


def fetch(
    run: RunDir,
    copy: CopyFolder,
    step: int,
    timeout_s: float,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Fetch the copy of `step` into a run directory that is held, the checkpoint last.

    The record is fetched too where the directory's own is shorter. Raises `CheckpointError`,
    `StalledError`. Raises `StorageError` when it cannot be determined whether the copy is intact, or
    there is no space for it.
    """
    deadline = Deadline(f"fetching step {step} from {copy.shown}", timeout_s)
    what = f"step {step} of {copy.shown}"
    reading = f"reading {what}"

    def get() -> None:
        run_within(timeout_s, reading, lambda: copy.get(step, partial, deadline))

    num_bytes = run_with_retries(
        lambda: run_within(timeout_s, reading, lambda: copy.num_bytes(step)), what, CURE, sleep
    )
    partial = checkpoint_folder.begin(run.checkpoints, step, num_bytes)
    try:
        run_with_retries(get, what, CURE, sleep)
        checkpoint = checkpoint_folder.read(partial / CHECKPOINT)
        if checkpoint.state.step != step:
            raise CheckpointError(f"{copy.shown}: step {step} holds step {checkpoint.state.step}")
        for version in (partial / REFERENCE).glob("v*"):
            _place_reference(run, version, deadline)
        records = read_metrics(run.metrics)
        if not records or records[-1]["step"] < step:
            for path in (partial / RECORD).glob("*"):
                path.replace(run.path / path.name)
            sync_folder(run.path)
        checkpoint_folder.adopt(
            partial / CHECKPOINT, run.checkpoints / checkpoint_folder.name_of(step)
        )
    except OSError as error:
        if isinstance(error, StalledError):
            raise
        raise StorageError(f"{run.path}: cannot place the copy of step {step} ({error})") from error
    finally:
        deadline.cancel()  # a thread that hangs writes no more
        shutil.rmtree(partial, ignore_errors=True)


CURE = "A copy that is lost for good may be deleted there: the one before it is fetched then"


def _place_reference(run: RunDir, fetched: Path, deadline: Deadline) -> None:
    """Move a fetched reference into the run.

    An intact one that exists stays: other checkpoints may need it.
    """
    final = run.reference / fetched.name
    make_folders(run.reference)
    try:
        verify(final, deadline=deadline)
    except WeightError as error:
        if cause := find_storage_cause(error):
            raise StorageError(f"{final}: cannot be read ({cause!r})") from error
        sync_tree(fetched)
        shutil.rmtree(final, ignore_errors=True)
        fetched.rename(final)
    store.adopt(run.reference, int(fetched.name.removeprefix("v")))


def fetch_newest(
    run: RunDir,
    copy: CopyFolder,
    timeout_s: float,
    whole: Callable[[RunDir], Found],
    wanted: Callable[[int], bool] = lambda step: True,
    sleep: Callable[[float], None] = time.sleep,
) -> Found:
    """Fetch the newest intact copy of `wanted` steps into `run`.

    Returns it, and what is wrong with newer ones.

    Raises `StorageError`, `StalledError` when the storage does not answer.
    """
    damaged: list[str] = []
    try:
        listing = f"listing {copy.shown}"
        steps = run_with_retries(
            lambda: run_within(timeout_s, listing, copy.steps), copy.shown, "", sleep
        )
    except CheckpointError as error:
        raise StorageError(
            f"{error}. It is unknown whether this run has a checkpoint there that it could resume "
            "from: repair the storage, or start another run with --set run.name=NEW"
        ) from error
    for step in filter(wanted, reversed(steps)):
        try:
            fetch(run, copy, step, timeout_s, sleep)
        except StorageError:
            raise
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        found = whole(run)
        if found.checkpoint is not None and found.checkpoint.state.step == step:
            origin = f"step {step} was fetched from {copy.shown}"
            return Found(checkpoint=found.checkpoint, damaged=damaged, origin=origin)
        damaged += found.damaged
    return Found(checkpoint=None, damaged=damaged)


@dataclass(slots=True, kw_only=True)
class CopyStats:
    """Counters of copies. `last` is the newest step that has a copy, -1 for none."""

    last: int = -1
    failed: int = 0


@dataclass(slots=True, kw_only=True)
class Copies:
    """Background writer that keeps copies of the checkpoints on disk."""

    run: RunDir
    copy: CopyFolder
    timeout_s: float
    tell: Callable[[str], None]
    stats: CopyStats = field(default_factory=CopyStats)
    _wanted: frozenset[int] = frozenset()
    _running: asyncio.Task[None] | None = None

    def follow(self, steps: Iterable[int]) -> None:
        """Copy the checkpoints of `steps`, which are all that are on disk. Returns at once."""
        self._wanted = frozenset(steps)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._catch_up())

    async def drain(self) -> None:
        """Wait for copies that are in progress or due. Unblocked by: their ends or their deadlines."""
        if self._running is not None:
            await self._running

    def close(self) -> None:
        """Stop copying. A copy in progress ends soon after, without its marker."""
        if self._running is not None:
            self._running.cancel()

    async def _catch_up(self) -> None:
        tried: set[int] = set()
        while due := self._wanted - tried:
            step = max(due)
            tried.add(step)
            try:
                await self._in_time(step)
            except RlhfError as error:
                self.stats.failed += 1
                self.tell(f"no copy of the checkpoint of step {step}: {error}")

    def _copy(self, step: int, deadline: Deadline) -> None:
        """Copy the checkpoint of `step`, and remove obsolete copies. Runs in a separate thread."""
        checkpoint = checkpoint_folder.check(self.run.checkpoints / checkpoint_folder.name_of(step))
        if not self.copy.has(checkpoint):
            there = [w for w in self._wanted if w < step and self.copy.is_complete(w)]
            if there:
                self._remove_older(max(there), deadline)
            self.copy.put(step, contents(self.run, checkpoint), deadline)
        self.stats.last = max(self.stats.last, step)
        if step == max(self._wanted):
            self._remove_older(step, deadline)
            for other in self.copy.steps():
                if other > step and self.copy.is_complete(other):
                    self.copy.set_aside(other)

    def _remove_older(self, whole: int, deadline: Deadline) -> None:
        """Remove copies that are older than the complete one of step `whole` and not on disk."""
        for other in self.copy.steps():
            if other < whole and other not in self._wanted:
                deadline.left_s("the removal of older copies")
                self.copy.remove(other)

    async def _in_time(self, step: int) -> None:
        """Run `_copy` in a thread, so that a hanging storage does not hold up the run's end.

        Waits for: the thread. Unblocked by: its end, or the deadline, after which it writes no marker.
        """
        deadline = Deadline(f"the copy of step {step} to {self.copy.shown}", self.timeout_s)
        try:
            async with asyncio.timeout(self.timeout_s):
                with self.copy.translate_errors(f"copy step {step} to"):
                    await run_in_thread(self._copy, step, deadline)
        except TimeoutError as error:
            if isinstance(error, StalledError):
                raise
            raise StalledError(
                f"{self.copy.shown}: not copied within checkpoint.timeout_s = {self.timeout_s:g} s"
            ) from None
        finally:
            deadline.cancel()


def folder_of(config: AnyConfig) -> CopyFolder | None:
    """Return the folder of the run's copies, None without `copy_to`. Raises `CheckpointError`."""
    url = config.checkpoint.copy_to
    return None if url is None else CopyFolder(url, config.run.name)


def forget(copy: CopyFolder) -> None:
    """Remove the copies of an earlier run of this name. Raises `RunError`."""
    try:
        for step in copy.steps():
            copy.remove(step)
    except CheckpointError as error:
        raise RunError(
            f"{error}. Copies of an earlier run of this name cannot be removed; a later resume could "
            "take them for this run's. Repair the storage, or change run.name or checkpoint.copy_to"
        ) from error
