"""Processes of a run, found in /proc: by a word in the environment they were started with, or as kin of
one that was seen before.

The word is the run's own folder in PYTHONPATH, which the driver hands to every actor and they to their
children. A process id alone names nobody, because the system gives it out again: here it goes with the
time at which the process started.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, order=True)
class Process:
    pid: int
    started: int  # clock ticks since boot

    def alive(self) -> bool:
        """Whether it runs; a zombie does not."""
        return of_pid(self.pid) == self

    def command(self) -> str:
        words = _read(self.pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()
        return words[:200] or "?"


def of_pid(pid: int) -> Process | None:
    """The process that has this id now, if it runs."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    if len(fields) < 20 or fields[0] in (b"Z", b"X"):
        return None
    return Process(pid, int(fields[19]))


def marked(word: str) -> set[Process]:
    """All processes that were started with `word` in a variable of their environment, but this one."""
    found = set()
    for entry in Path("/proc").iterdir():
        pid = int(entry.name) if entry.name.isdigit() else os.getpid()
        if pid != os.getpid() and word.encode() in _read(pid, "environ"):
            found.add(of_pid(pid))
    return {process for process in found if process is not None}


def descendants(pid: int) -> set[int]:
    """Ids of the children of `pid`, and of theirs."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            children.setdefault(_parent(int(entry.name)), []).append(int(entry.name))
    found: set[int] = set()
    left = [pid]
    while left:
        new = children.get(left.pop(), [])
        found.update(new)
        left.extend(new)
    return found


def open_files(pid: int) -> list[Path]:
    """Of a process; none of one that is gone, or another user's."""
    found = []
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            found.append(entry.readlink())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return found
    return found


def _parent(pid: int) -> int:
    """0 for a process that is gone."""
    fields = _read(pid, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if len(fields) > 1 else 0


def _read(pid: int, name: str) -> bytes:
    """Empty for a process that is gone, or another user's."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return b""
