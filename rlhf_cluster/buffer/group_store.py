"""Finished groups on disk: one immutable file per group.

    <run directory>/experience/ g00000012.arrow      of attempt 0; `buffer.group_file` has the format
                                g00000012.a2.arrow    the same group of attempt 2
                                attempt.json          the attempt that writes now
                                .g00000012.*.partial  being written, or left by a process that died

Promises:
- a file has its name only when all of it is written. A process that dies therefore leaves a complete
  file or none; with fsync = "group" that holds for the machine too;
- a file that is not as it was written is never used: `read` says which one and what is wrong with it;
- `write` raises `StoreError` when the group is not completely on disk, and leaves no file behind. The
  run then has to end, since it cannot keep what it promises. The same holds for a disk that takes
  longer than `patience` allows: what such a write leaves in the end is complete, or has no name;
- a file is of the attempt of its ticket. A call of an abandoned attempt, which ends later, replaces no
  file of the next attempt, and its file is never read (`buffer.group_recovery`);
- names come from ticket numbers and attempts alone, and nothing is unpickled.

Several processes may write, also the same group: the last file stays. Only one process of the run
decides which files are deleted, by `buffer.group_recovery`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from rlhf_cluster.buffer import group_file
from rlhf_cluster.buffer.group_file import Header
from rlhf_cluster.errors import StalledError, StorageError, StoreError
from rlhf_cluster.records import ExperienceGroup, Handle, StoredGroup, Ticket
from rlhf_cluster.util.durable_files import (
    make_folders,
    run_with_retries,
    write_atomically,
)
from rlhf_cluster.util.slow_disk import DiskDeadline

Fsync = Literal["group", "never"]
ATTEMPT = "attempt.json"
PAUSES = (0.5, 1.0, 2.0)
"""Seconds between tries to read a group while the storage answers with an error."""
_NAME = re.compile(r"g(\d{8,})(?:\.a(\d+))?\.arrow")


class ExperienceStore:
    """Groups of one run, in the folder `root`, which is created with the first of them.

    It reads files of `attempt`, by default the one that `attempt.json` names, and writes those of any.
    `made_by` identifies the settings that groups are made with. Tests replace `write_file`.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        made_by: str = "0" * 32,
        fsync: Fsync = "never",
        write_file: Callable[[int, memoryview], int] = os.write,
        attempt: int | None = None,
        patience: DiskDeadline | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Keep the arguments. `patience` bounds a write; without it a write may take any time."""
        self.root = Path(root)
        self._attempt = attempt
        self.made_by = made_by
        self.fsync = fsync == "group"
        self._write_file = write_file
        self._patience = patience
        self._sleep = sleep

    @property
    def attempt(self) -> int:
        """Attempt whose files are read, by default the one on disk. Raises `StoreError`."""
        if self._attempt is None:
            try:
                read = functools.partial(read_attempt, self.root)
                found = run_with_retries(read, self.root / ATTEMPT, "", self._sleep, PAUSES)
            except StorageError as error:
                raise StoreError(str(error)) from error
            self._attempt = max(0, found)
        return self._attempt

    @attempt.setter
    def attempt(self, attempt: int) -> None:
        self._attempt = attempt

    def path(self, number: int, attempt: int | None = None) -> Path:
        """Return the path of a group's file of `attempt`, by default the one that is read."""
        attempt = self.attempt if attempt is None else attempt
        mark = f".a{attempt}" if attempt else ""
        return self.root / f"{Ticket(number=number, version=0).group_id}{mark}.arrow"

    def write(self, group: ExperienceGroup, reference_version: int = -1) -> Path:
        """Write `group` to its file, and return the path.

        `reference_version` is the newest reference that the group was scored with, if any. Raises
        `StoreError` with path, bytes and a fix.
        """
        newest = max((int(s.rollout.versions.max()) for s in group.scored), default=-1)
        header = Header(newest_version=max(newest, reference_version), made_by=self.made_by)
        image = group_file.encode(group, header)
        path = self.path(group.ticket.number, group.ticket.attempt)
        try:
            if self._patience is None:
                self._replace(path, image)
            else:
                what = f"{path}, {len(image)} bytes,"
                self._patience.wait(what, lambda: self._replace(path, image))
        except StalledError as error:  # every TimeoutError is an OSError too
            raise StoreError(
                f"group {group.group_id}: {error}. Look at that disk, give run.root a faster one or "
                "raise buffer.write_timeout_s, and rerun the command: it resumes"
            ) from error
        except OSError as error:
            raise StoreError(
                f"{path}: {len(image)} bytes of group {group.group_id} cannot be written ({error}). "
                "Free space there, or give run.root another folder, and start the same command "
                "again; buffer.durable = false does without this file"
            ) from error
        return path

    def read(self, number: int) -> ExperienceGroup:
        """Return group `number`. Raises `StoreError`: missing, damaged, or of another number."""
        return self.read_with_header(number)[0]

    def read_with_header(self, number: int) -> tuple[ExperienceGroup, Header]:
        path = self.path(number)
        try:
            image = run_with_retries(path.read_bytes, path, "", self._sleep, PAUSES)
        except FileNotFoundError as error:
            raise StoreError(f"{path}: there is no such file; group {number} is lost") from error
        except (OSError, StorageError) as error:
            raise StoreError(f"{path}: cannot be read ({error})") from error
        try:
            group, header = group_file.decode(image)
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from error
        if group.ticket.number != number:
            raise StoreError(f"{path}: holds group {group.group_id}; the file was renamed")
        return group, header

    def header(self, number: int, attempt: int | None = None) -> Header:
        """Return the header from the file's beginning alone, unverified. Raises `StoreError`."""
        path = self.path(number, attempt)
        try:
            with path.open("rb") as file:
                return group_file.read_header(file.read(group_file.HEADER_BYTES))
        except OSError as error:
            raise StoreError(f"{path}: cannot be read ({error})") from error
        except StoreError as error:
            raise StoreError(f"{path}: {error}") from error

    def has(self, number: int) -> bool:
        return self.path(number).is_file()

    def numbers(self) -> list[int]:
        """Return the numbers of the groups that have a file, rising. Raises `StoreError`."""
        return sorted(number for number, attempt in self.files() if attempt == self.attempt)

    def files(self) -> list[tuple[int, int]]:
        """Return the number and attempt of every file. Raises `StoreError`."""
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StoreError(f"{self.root}: cannot be listed ({error})") from error
        found = [match for name in names if (match := _NAME.fullmatch(name))]
        return sorted((int(match[1]), int(match[2] or 0)) for match in found)

    def remove(self, numbers: Iterable[int], attempt: int | None = None) -> None:
        """Delete the files of `numbers`. Raises `StoreError` for one that cannot be deleted."""
        for number in numbers:
            path = self.path(number, attempt)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise StoreError(f"{path}: cannot be deleted ({error})") from error

    def adopt(self, number: int, attempt: int) -> None:
        """Make the file of `attempt` one of the attempt that is read. Raises `StoreError`.

        A missing file is ignored: a late call of the attempt before may have deleted it.
        """
        path = self.path(number, attempt)
        try:
            with suppress(FileNotFoundError):
                path.replace(self.path(number))
        except OSError as error:
            raise StoreError(f"{path}: cannot be renamed ({error})") from error

    def remove_partial(self) -> None:
        """Delete the leftovers of writers that died. Call while no process writes."""
        for leftover in self.root.glob(".g*.partial"):
            leftover.unlink(missing_ok=True)

    def _replace(self, path: Path, image: bytes) -> None:
        make_folders(self.root, self.fsync)
        # Several writers may have the same group.
        with write_atomically(path, self.fsync, f".{uuid.uuid4().hex}") as file:
            rest = memoryview(image)
            while rest:
                rest = rest[self._write_file(file.fileno(), rest) :]


def read_attempt(root: Path) -> int:
    """Return the attempt that writes, or wrote last, into `root`; -1 before the first.

    Raises `StoreError` if it cannot be read: a wrong number would delete finished groups.
    """
    path = root / ATTEMPT
    try:
        return int(json.loads(path.read_bytes())["attempt"])
    except FileNotFoundError:
        return -1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{path}: the number of the attempt cannot be read ({type(error).__name__}: {error}). Look "
            f"at that disk. A file that is damaged for good may be replaced by "
            f'{{"attempt": N}}, N the largest after ".a" in the names next to it, 0 without one'
        ) from error


def collect(
    wanted: Sequence[tuple[int, Handle]],
    fetch: Callable[[Sequence[Handle]], Sequence[ExperienceGroup | None]],
    store: ExperienceStore | None,
) -> list[ExperienceGroup]:
    """Return the groups of `wanted`, which are pairs of ticket number and handle, in order.

    `fetch` returns the group of a handle, or None if it cannot be had any more. Such a group is read
    from `store`, as is a `StoredGroup`. Raises `StoreError` for a group that is nowhere.
    """
    elsewhere = [handle for _, handle in wanted if not isinstance(handle, StoredGroup)]
    fetched = iter(fetch(elsewhere) if elsewhere else ())
    groups = []
    for number, handle in wanted:
        group = None if isinstance(handle, StoredGroup) else next(fetched)
        if group is None:
            if store is None:
                raise StoreError(
                    f"group {number} was lost with the node that held it, and buffer.durable = false "
                    "keeps no copy. The same command resumes from the last checkpoint"
                )
            group = store.read(number)
        if isinstance(handle, StoredGroup):
            group = replace(group, uses=handle.uses, weight=handle.weight)
        groups.append(group)
    return groups
