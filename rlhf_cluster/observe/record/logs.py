"""Logging of one process: everything to `<log_dir>/<name>.log`, warnings to stderr as well.

Promises:
- every line, those of tracebacks included, starts with its UTC time, level, role and name, so that
  the logs of a run merge by sorting;
- a process that is configured twice writes each line once;
- no line holds the value of an environment variable whose name says that it is secret, or the
  credentials of a URL;
- logging never waits for the disk. Lines that a slow disk drops are counted in the log.
"""

from __future__ import annotations

import heapq
import logging
import os
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import RunError
from rlhf_cluster.observe.record import stacks
from rlhf_cluster.util import provenance

log = logging.getLogger(__name__)

OURS = ("rlhf_cluster", "actors")
MAX_WAITING = 10_000
"""Records that wait for the disk; further ones are dropped."""
FLUSH_S = 5.0
"""Longest time that the end of a process waits for them."""
_MARK = "_rlhf_cluster_handler"


class _LineFormatter(logging.Formatter):
    def __init__(self, role: str, name: str) -> None:
        super().__init__()
        self._who = f"{role} {name}"

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = f"{time.removesuffix('+00:00')}Z {record.levelname} {self._who}"
        lines = provenance.redact_process_secrets(super().format(record)).splitlines() or [""]
        return "\n".join(f"{head} {record.name}: {line}" for line in lines)


class BackgroundFileHandler(QueueHandler):
    """Log handler whose thread appends each record to the file at `path`.

    At most `max_waiting` records wait. One more, or one that the disk refuses, is dropped and counted
    in the next line that is written. `write` is replaced by tests.
    """

    def __init__(
        self,
        path: Path,
        max_waiting: int = MAX_WAITING,
        write: Callable[[int, memoryview], int] = os.write,
    ) -> None:
        self._waiting: queue.Queue[str | None] = queue.Queue(max_waiting)
        super().__init__(self._waiting)
        self._path, self._write = path, write
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        self._pid = os.getpid()
        self._counting = threading.Lock()
        self._num_dropped, self._is_torn = 0, False
        self._num_written, self._given_up_at = 0, -1
        self._writer = threading.Thread(target=self._work, name="log", daemon=True)
        self._writer.start()

    def prepare(self, record: logging.LogRecord) -> Any:
        """Format the text in the logging thread: its arguments may change later."""
        return self.format(record)

    def enqueue(self, record: Any) -> None:
        if os.getpid() != self._pid:  # a forked child has no thread that writes
            self._append(record)
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._drop()

    def flush(self) -> None:
        """Write everything that was logged.

        Waits for: the disk, at most `FLUSH_S`; not at all if it took nothing since the last timeout.
        """
        if os.getpid() != self._pid or self._num_written == self._given_up_at:
            return
        waiting = self._waiting
        with waiting.all_tasks_done:
            is_empty = waiting.all_tasks_done.wait_for(
                lambda: not waiting.unfinished_tasks, FLUSH_S
            )
            self._given_up_at = -1 if is_empty else self._num_written

    def close(self) -> None:
        """Flush and close. What is not written within `FLUSH_S` is left to the thread."""
        self.flush()
        if self._writer.is_alive() and os.getpid() == self._pid:
            try:
                self._waiting.put_nowait(None)
            except queue.Full:
                log.debug("%s stays open: its disk does not answer", self._path)
        super().close()

    def _work(self) -> None:
        while (text := self._waiting.get()) is not None:
            try:
                self._append(text)
            finally:
                self._num_written += 1
                self._waiting.task_done()
        self._waiting.task_done()
        os.close(self._fd)

    def _append(self, text: str) -> None:
        with self._counting:
            dropped, self._num_dropped = self._num_dropped, 0
        lines = "\n" * self._is_torn + (self._missing(dropped) if dropped else "") + f"{text}\n"
        rest = memoryview(lines.encode(errors="backslashreplace"))
        whole = len(rest)
        try:
            while rest:
                rest = rest[self._write(self._fd, rest) :]
        except OSError:
            self._drop(dropped + 1)
        self._is_torn = bool(rest) and (self._is_torn or len(rest) < whole)

    def _missing(self, number: int) -> str:
        text = f"{number} records are missing before this: the disk was slow or refused them"
        told = {"name": __name__, "levelname": "WARNING", "levelno": logging.WARNING, "msg": text}
        return self.format(logging.makeLogRecord({**told, "created": time.time()})) + "\n"

    def _drop(self, number: int = 1) -> None:
        with self._counting:
            self._num_dropped += number


def flush() -> None:
    """Write what this process has logged to its file. Waits for: the disk, at most `FLUSH_S`."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, BackgroundFileHandler):
            handler.flush()


def configure(role: str, name: str, log_dir: str | Path) -> logging.Logger:
    """Set up this process's logging and return its logger. Libraries log from WARNING on.

    Afterwards the process answers requests for its stacks (`observe.record.stacks`).
    `RLHF_DEBUG=1` in the environment lets our own loggers write DEBUG lines too.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"log name {name!r}: use letters, digits, '.', '_' and '-' only")
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    provenance.hide(provenance.find_secrets({}))
    stacks.answer(log_dir, name)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, _MARK, False):
            root.removeHandler(handler)
            handler.close()
    to_file = BackgroundFileHandler(Path(log_dir) / f"{name}.log")
    to_stderr = logging.StreamHandler(sys.stderr)
    to_stderr.setLevel(logging.WARNING)
    for handler in (to_file, to_stderr):
        handler.setFormatter(_LineFormatter(role, name))
        setattr(handler, _MARK, True)
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    level = logging.DEBUG if os.environ.get("RLHF_DEBUG") == "1" else logging.INFO
    for ours in OURS:
        logging.getLogger(ours).setLevel(level)
    return logging.getLogger(f"rlhf_cluster.{role}")


def log_names(log_dir: str | Path) -> list[str]:
    """Return the names of the processes that have a log."""
    return sorted(path.stem for path in Path(log_dir).glob("*.log"))


def read_logs(log_dir: str | Path, names: list[str], tail: int | None = None) -> Iterator[str]:
    """Return lines of the named logs in order of time, the last `tail` of them (None = all)."""
    streams = [_lines(Path(log_dir) / f"{name}.log") for name in names]
    merged = heapq.merge(*streams)
    yield from merged if tail is None else deque(merged, maxlen=tail)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")
