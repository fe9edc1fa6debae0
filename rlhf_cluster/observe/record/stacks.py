"""Stacks of the threads of a run's processes, which each process writes on request.

    <logs>/<name>.stacks    first line: host, pid and start of the process; then one answer per request

Promises:
- a process whose threads all wait, even in C code, answers: the signal's handler writes the stacks
  without Python. A process that is stopped, or whose machine hangs, is reported as silent;
- only a process with a file here gets the signal, and only while pid and start are those of the file;
- `ask` waits at most `within_s`, and raises nothing for a process that has ended.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

ASK = signal.SIGUSR2
MAX_LINES = 400
POLL_S = 0.05
"""An answer is whole when it has not grown for this long."""
SILENT = "did not answer within {:g} s: stopped, or its machine is"
_ENDING = ".stacks"
_files: list[IO[str]] = []
"""Open as long as the process lives: the handler writes to the number of the open file."""


def answer(log_dir: str | Path, name: str) -> None:
    """Make this process write its stacks whenever it is asked."""
    file = (Path(log_dir) / f"{name}{_ENDING}").open("w", encoding="utf-8")
    # The handler comes first: a process that the file names gets the signal.
    faulthandler.register(ASK, file=file, all_threads=True)
    who = {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}
    file.write(json.dumps(who) + "\n")
    file.flush()
    for old in _files:
        old.close()
    _files[:] = [file]


def hosts(log_dir: str | Path) -> set[str]:
    """Return the hosts where processes of the run were started."""
    return {str(who["host"]) for _, who, _ in _processes(log_dir)}


def ask(log_dir: str | Path, within_s: float) -> dict[str, list[str]]:
    """Return the stacks of the other living processes on this host, by name, each as lines.

    Waits for: an answer of each of them; `within_s` unblocks it.
    """
    asked: dict[str, tuple[Path, int]] = {}
    for path, who, length in _processes(log_dir):
        pid = int(who["pid"])
        if who["host"] != socket.gethostname() or pid == os.getpid():
            continue
        if (start := _start_of(pid)) is None or start != who["start"]:
            continue
        try:
            os.kill(pid, ASK)
        except OSError:  # it ended meanwhile, or is another user's
            continue
        asked[path.stem] = (path, length)
    deadline = time.monotonic() + within_s
    told: dict[str, bytes] = dict.fromkeys(asked, b"")
    while time.monotonic() < deadline:
        time.sleep(POLL_S)
        before, told = told, {name: _read_after(*where) for name, where in asked.items()}
        if all(text and text == before[name] for name, text in told.items()):
            break
    return {name: _lines(text) or [SILENT.format(within_s)] for name, text in told.items()}


def _read_after(path: Path, length: int) -> bytes:
    """Return what was written after the first `length` bytes."""
    with path.open("rb") as file:
        file.seek(length)
        return file.read()


def _lines(told: bytes) -> list[str]:
    return [line for line in told.decode(errors="replace").splitlines() if line][:MAX_LINES]


def _processes(log_dir: str | Path) -> Iterator[tuple[Path, dict[str, Any], int]]:
    """Yield each file, the process that writes it, and its length."""
    for path in sorted(Path(log_dir).glob(f"*{_ENDING}")):
        data = path.read_bytes()
        try:
            yield path, json.loads(data.partition(b"\n")[0]), len(data)
        except ValueError:  # cut short by the death of its process
            continue


def _start_of(pid: int) -> str | None:
    """Return the start time of the process in the kernel's ticks; None where there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    after_name = status.rpartition(")")[2].split()
    return None if after_name[0] in "ZX" else after_name[19]
