"""The run's own record of its steps: metrics.jsonl.

Promises: a line of metrics.jsonl is one JSON object with `step`, `time_s` and metrics by name, each
a finite number or null, and is on its way to the disk when `append` returns; steps never go back;
a file whose last line was torn by a crash is read without it, and mended before the next line.
Several lines of one step (an evaluation beside a training step) read as one record.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import RunError
from rlhf_cluster.observe.metrics import find
from rlhf_cluster.observe.sinks import Sinks
from rlhf_cluster.rundir import RunDir

Record = dict[str, Any]


class RunLog:
    """Writer of one run's record. One process, one at a time. `sinks` get what it gets."""

    def __init__(self, run: RunDir, sinks: Sinks | None = None) -> None:
        self._run, self._sinks = run, sinks
        self._open()

    def _open(self) -> None:
        run = self._run
        _cut_torn_line(run.metrics)
        records = read_metrics(run.metrics)
        self._last_step = records[-1]["step"] if records else 0
        self._file = run.metrics.open("ab", buffering=0)

    def append(self, step: int, time_s: float, values: Mapping[str, float]) -> None:
        """One line. `time_s` is unix time. `MetricError` for a name that is not in the table,
        `RunError` when the line is not in the file as a whole: the run has no record then."""
        if step < self._last_step:
            raise RunError(
                f"{self._run.metrics}: step {step} after step {self._last_step}; steps never go "
                "back. Is another run writing here?"
            )
        for name in values:
            find(name)
        line = {"step": step, "time_s": time_s}
        line |= {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        self._write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._last_step = step
        if self._sinks is not None:
            self._sinks.log(step, values)

    @property
    def num_dropped_sinks(self) -> int:
        return 0 if self._sinks is None else self._sinks.num_dropped

    def _write(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            raise RunError(
                f"{self._run.metrics}: a line of {len(line)} bytes cannot be written ({error}). Free "
                "space there, and give the same command again: it goes on from the last checkpoint"
            ) from error

    def reopen(self) -> None:
        """Go on behind what the file holds now, after `cut_metrics`."""
        self._file.close()
        self._open()

    def close(self) -> None:
        """Waits for: the sinks, at most `sinks.CLOSE_TIMEOUT_S`."""
        self._file.close()
        if self._sinks is not None:
            self._sinks.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def cut_metrics(path: str | Path, last_step: int) -> None:
    """Remove the lines of steps after `last_step`; the others stay as they are."""
    path = Path(path)
    if not path.exists():
        return
    _cut_torn_line(path)
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [
        line
        for line, record in zip(lines, _read_lines(path), strict=True)
        if record["step"] <= last_step
    ]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(b"".join(kept))
    os.replace(partial, path)


def read_metrics(path: str | Path) -> list[Record]:
    """All records by step; lines of one step are joined. A missing file is an empty one.

    A torn last line is left out; a damaged line anywhere else raises `RunError`.
    """
    records: dict[int, Record] = {}
    for record in _read_lines(Path(path)):
        records.setdefault(record["step"], {}).update(record)
    return [records[step] for step in sorted(records)]


def _read_lines(path: Path) -> Iterator[Record]:
    try:
        *lines, _torn = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("not an object with a step")
        except ValueError as error:
            raise RunError(
                f"{path}: line {number} is damaged ({error}). Remove that line to read the rest"
            ) from error
        yield record


def _cut_torn_line(path: Path) -> None:
    if not path.exists():
        return
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
