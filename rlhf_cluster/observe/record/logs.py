"""Logging of one process: everything to `<log_dir>/<name>.log`, warnings to stderr as well.

Promises: every line of a log, those of tracebacks included, starts with its UTC time, level, role
and name, so that the logs of a run merge by sorting; configuring twice does not write twice; no line
holds a value of the environment that its name calls secret, nor the credentials of a URL.
"""

from __future__ import annotations

import heapq
import logging
import os
import re
import sys
from collections import deque
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from rlhf_cluster.errors import RunError
from rlhf_cluster.observe.record import stacks
from rlhf_cluster.util import redaction

OURS = ("rlhf_cluster", "actors")
_MARK = "_rlhf_cluster_handler"


class _LineFormatter(logging.Formatter):
    def __init__(self, role: str, name: str) -> None:
        super().__init__()
        self._who = f"{role} {name}"

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        head = f"{time.removesuffix('+00:00')}Z {record.levelname} {self._who}"
        lines = redaction.of_process(super().format(record)).splitlines() or [""]
        return "\n".join(f"{head} {record.name}: {line}" for line in lines)


def configure(role: str, name: str, log_dir: str | Path) -> logging.Logger:
    """Set up this process's logging and return its logger. Libraries log from WARNING on. From then on
    the process tells its stacks when it is asked (`observe.record.stacks`).

    `RLHF_DEBUG=1` in the environment lets our own loggers write DEBUG lines too.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise RunError(f"log name {name!r}: use letters, digits, '.', '_' and '-' only")
    Path(log_dir).mkdir(parents=True, exist_ok=True)
    redaction.hide(redaction.secrets_of({}))
    stacks.answer(log_dir, name)
    root = logging.getLogger()
    for handler in list(root.handlers):
        if getattr(handler, _MARK, False):
            root.removeHandler(handler)
            handler.close()
    to_file = logging.FileHandler(Path(log_dir) / f"{name}.log", encoding="utf-8")
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
    """Names of the processes that have a log."""
    return sorted(path.stem for path in Path(log_dir).glob("*.log"))


def read_logs(log_dir: str | Path, names: list[str], tail: int | None = None) -> Iterator[str]:
    """Lines of the named logs in order of time, the last `tail` of them (None = all)."""
    streams = [_lines(Path(log_dir) / f"{name}.log") for name in names]
    merged = heapq.merge(*streams)
    yield from merged if tail is None else deque(merged, maxlen=tail)


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            yield line.rstrip("\n")
