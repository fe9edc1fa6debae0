"""A second copy of every checkpoint, and the way back from it.

    step-000050/ checkpoint/   the checkpoint's own files
                 record/       metrics.jsonl, resolved.json
                 reference/    the stored reference that it needs

Promises:
- copying goes on behind the steps, one checkpoint at a time, the newest first; one that cannot be
  copied by its deadline is told and counted, and costs the run nothing else;
- copies of other checkpoints than those on disk are removed once a newer one of those is there; one
  that is newer than all on disk is of a timeline that the run left: it is set aside, and goes when a
  copy of a later step is there;
- what is fetched is verified, and appears as a checkpoint of the run directory last, and whole;
- an error of the storage, or its silence, is not taken for a damaged copy: no older one is fetched.
"""

from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_cluster.checkpoint import folder
from rlhf_cluster.checkpoint.copy_folder import CHECKPOINT, RECORD, REFERENCE, CopyFolder, Told
from rlhf_cluster.checkpoint.folder import Checkpoint, Found
from rlhf_cluster.errors import (
    CheckpointError,
    RlhfError,
    RunError,
    StalledError,
    StorageError,
    WeightError,
)
from rlhf_cluster.observe.run_log import read_metrics
from rlhf_cluster.rundir import RunDir
from rlhf_cluster.slow_disk import within
from rlhf_cluster.storage import make_folders, passing, patiently, sync_folder, sync_tree
from rlhf_cluster.weights import store
from rlhf_cluster.weights.files import version_dir
from rlhf_cluster.weights.transport import Deadline
from rlhf_cluster.weights.verifying import verify

if TYPE_CHECKING:
    from rlhf_cluster.config.either import AnyConfig


def contents(run: RunDir, checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of a copy by their names in it."""
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
    """Put the copy of `step` into a run directory that is held, the checkpoint last.

    The record comes along where the directory's own is shorter. Raises `CheckpointError`,
    `StalledError`; `StorageError` when nobody can tell whether it is whole, or there is no room for it.
    """
    deadline = Deadline(f"fetching step {step} from {copy.shown}", timeout_s)
    what = f"step {step} of {copy.shown}"
    reading = f"reading {what}"

    def get() -> None:
        within(timeout_s, reading, lambda: copy.get(step, partial, deadline))

    num_bytes = patiently(
        lambda: within(timeout_s, reading, lambda: copy.num_bytes(step)), what, CURE, sleep
    )
    partial = folder.begin(run.checkpoints, step, num_bytes)
    try:
        patiently(get, what, CURE, sleep)
        checkpoint = folder.read(partial / CHECKPOINT)
        if checkpoint.state.step != step:
            raise CheckpointError(f"{copy.shown}: step {step} holds step {checkpoint.state.step}")
        for version in (partial / REFERENCE).glob("v*"):
            _place_reference(run, version, deadline)
        records = read_metrics(run.metrics)
        if not records or records[-1]["step"] < step:
            for path in (partial / RECORD).glob("*"):
                path.replace(run.path / path.name)
            sync_folder(run.path)
        folder.adopt(partial / CHECKPOINT, run.checkpoints / folder.name_of(step))
    except OSError as error:
        if isinstance(error, StalledError):
            raise
        raise StorageError(f"{run.path}: cannot place the copy of step {step} ({error})") from error
    finally:
        deadline.cancel()  # a thread that hangs writes no more
        shutil.rmtree(partial, ignore_errors=True)


CURE = "A copy that is lost for good may be deleted there: the one before it is fetched then"


def _place_reference(run: RunDir, fetched: Path, deadline: Deadline) -> None:
    """One that is there and whole stays: other checkpoints may need it."""
    final = run.reference / fetched.name
    make_folders(run.reference)
    try:
        verify(final, deadline=deadline)
    except WeightError as error:
        if cause := passing(error):
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
    """The newest copy that is whole, of those of `wanted` steps, now in `run`, and what is wrong with
    newer ones. Raises `StorageError`, `StalledError` when the storage does not answer.
    """
    damaged: list[str] = []
    try:
        listing = f"listing {copy.shown}"
        steps = patiently(lambda: within(timeout_s, listing, copy.steps), copy.shown, "", sleep)
    except CheckpointError as error:
        raise StorageError(
            f"{error}. Nobody can tell whether this run has a checkpoint there that it could go on "
            "from: mend the storage, or start another run with --set run.name=NEW"
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
    """`last` is the step of the newest checkpoint that has a copy, -1 for none."""

    last: int = -1
    failed: int = 0


@dataclass(slots=True, kw_only=True)
class Copies:
    """Keeps copies of the checkpoints on disk. `find` gives a checkpoint by its step."""

    run: RunDir
    copy: CopyFolder
    timeout_s: float
    tell: Callable[[str], None]
    stats: CopyStats = field(default_factory=CopyStats)
    _wanted: frozenset[int] = frozenset()
    _running: asyncio.Task[None] | None = None

    def follow(self, steps: Iterable[int]) -> None:
        """The checkpoints of `steps` are on disk, and no others. Returns at once."""
        self._wanted = frozenset(steps)
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._catch_up())

    async def drain(self) -> None:
        """Waits for: copies under way and due. Unblocked by: their ends or their deadlines."""
        if self._running is not None:
            await self._running

    def close(self) -> None:
        """Nothing is copied any more; one under way ends, without its marker, soon after."""
        if self._running is not None:
            self._running.cancel()

    async def _catch_up(self) -> None:
        tried: set[int] = set()
        while due := self._wanted - tried:
            step = max(due)
            tried.add(step)
            try:
                await self._in_time(lambda deadline, step=step: self._copy(step, deadline), step)
            except RlhfError as error:
                self.stats.failed += 1
                self.tell(f"no copy of the checkpoint of step {step}: {error}")

    def _copy(self, step: int, deadline: Deadline) -> None:
        """Runs in a thread of its own."""
        checkpoint = folder.check(self.run.checkpoints / folder.name_of(step))
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
        """Copies before that of step `whole`, which is there, of checkpoints that are not on disk."""
        for other in self.copy.steps():
            if other < whole and other not in self._wanted:
                deadline.left_s("the removal of older copies")
                self.copy.remove(other)

    async def _in_time(self, work: Callable[[Deadline], None], step: int) -> None:
        """Waits for: a daemon thread, so that a storage that hangs does not hold up the run's end.
        Unblocked by: its end, or the deadline, after which the thread writes no marker."""
        deadline = Deadline(f"the copy of step {step} to {self.copy.shown}", self.timeout_s)
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def finish(error: BaseException | None) -> None:
            if not done.done():
                done.set_result(None) if error is None else done.set_exception(error)

        def run() -> None:
            error = None
            try:
                with Told(f"cannot copy step {step} to {self.copy.shown}"):
                    work(deadline)
            except Exception as caught:
                error = caught
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(finish, error)

        threading.Thread(target=run, name=f"copy-{step}", daemon=True).start()
        try:
            async with asyncio.timeout(self.timeout_s):
                await done
        except TimeoutError as error:
            if isinstance(error, StalledError):
                raise
            raise StalledError(
                f"{self.copy.shown}: not copied within checkpoint.timeout_s = {self.timeout_s:g} s"
            ) from None
        finally:
            deadline.cancel()


def folder_of(config: AnyConfig) -> CopyFolder | None:
    """Where the run's copies go, where they are asked for. Raises `CheckpointError`."""
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
            "take them for this run's. Mend the storage, or change run.name or checkpoint.copy_to"
        ) from error
