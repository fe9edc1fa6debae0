"""Reading and truncation of metrics.jsonl, which `observe.record.run_log` writes."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import RunError
from rlhf_cluster.util.durable_files import write_all

Record = dict[str, Any]


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
    write_all(path, b"".join(kept), fsync=True)


def read_metrics(path: str | Path) -> list[Record]:
    """Return all records, sorted by step, with the lines of one step merged.

    A missing file has no records. A partially written last line is skipped. Raises `RunError` for a
    damaged line anywhere else.
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
