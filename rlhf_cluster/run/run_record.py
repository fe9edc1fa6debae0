"""Records of a run in its directory: metrics.jsonl, and its state as status.json shows it.

`observe.record.run_log` writes both. A state is a frozen value that survives JSON both ways; a number
that is not known yet is None.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlhf_cluster.errors import RunError
from rlhf_cluster.util.durable_files import write_all

Record = dict[str, Any]
State = Literal[
    "starting", "warmup", "evaluating", "running", "recovering", "finished", "failed", "stopped"
]


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

    A line that comes after one of a later step (a late point of an evaluation) adds its
    values to its step and leaves the step's time.

    A missing file has no records. A partially written last line is skipped. Raises `RunError` for a
    damaged line anywhere else.
    """
    records: dict[int, Record] = {}
    newest = -1
    for record in _read_lines(Path(path)):
        step = record["step"]
        found = records.setdefault(step, {})
        found.update(
            {**record, **{k: v for k, v in found.items() if k == "time_s" and step < newest}}
        )
        newest = max(newest, step)
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


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Workers of one pool: how many answer, and how many there should be.

    `restarts` counts those that were replaced, `quarantined` those of them that a rule of quarantine
    replaced.
    """

    name: str
    alive: int
    wanted: int
    restarts: int = 0
    quarantined: int = 0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened: a restart, a discard, a scaling."""

    time_s: float  # unix time
    text: str


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Snapshot of a run. All numbers are of the last finished step, or as of `time_s`."""

    run: str
    state: State
    step: int
    num_steps: int
    time_s: float  # unix time of this snapshot
    elapsed_s: float = 0.0
    reward: float | None = None
    reward_mean10: float | None = None  # mean over the last 10 steps
    reward_held_out: float | None = None  # of the last evaluation
    left_s: float | None = None  # until the last step, at the pace of the last steps
    staleness_mean: float | None = None
    staleness_max: float | None = None
    response_length_tokens: float | None = None
    tokens_per_s: float | None = None
    step_s: float | None = None
    learner_wait_s: float | None = None  # of the last step: the learner waited for groups
    generation_wait_s: float | None = None  # of the last step: admission waited for a slot
    pools: tuple[Pool, ...] = ()
    buffer_in_flight: int = 0
    buffer_ready: int = 0
    buffer_discarded: int = 0
    version_published: int | None = None
    version_live: int | None = None
    restarts: int = 0  # of learner and buffer, after a failure
    checkpoint: int | None = None  # step of the last complete checkpoint
    stage: str | None = None  # type of an offline stage; only a stage has the next three
    metric: str | None = None  # name of the number that the stage is monitored by
    metric_value: float | None = None
    metric_held_out: float | None = None  # of the last evaluation
    advice: str | None = None  # what bounds the run, and what one more worker would give
    events: tuple[Event, ...] = ()
    error: str | None = None

    @property
    def is_active(self) -> bool:
        """Whether a process should be at work on the run."""
        return self.state not in ("finished", "failed", "stopped")

    @property
    def standing(self) -> str:
        """State as text, with the step that the same command would resume from."""
        ended = self.state in ("failed", "stopped") and self.checkpoint is not None
        return f"{self.state}, resumable from step {self.checkpoint}" if ended else self.state

    def to_json(self) -> str:
        """Return one JSON object. Numbers that are not finite become null."""
        return _adapter().dump_json(self, indent=2).decode() + "\n"

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Parse the result of `to_json`. Raises `RunError` for anything else."""
        from pydantic import ValidationError

        try:
            return _adapter().validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the whole text"
            raise RunError(
                f"not a run's status: {place}: {first['msg']}. Was it written by this version?"
            ) from None


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Snapshot)


def who_waits(
    learner_wait_s: float | None, generation_wait_s: float | None, step_s: float | None
) -> str:
    """Describe which side waits for the other, as shares of the step's wall time.

    A share of less than 1 % is omitted.
    """
    if not step_s or step_s <= 0:
        return "no step yet"
    waits = (
        ("learner waits for generation", learner_wait_s),
        ("generation waits for the learner", generation_wait_s),
    )
    parts = [
        f"{who} {min(wait_s / step_s, 1.0):.0%} of the time".replace("%", " %")
        for who, wait_s in waits
        if wait_s is not None and wait_s / step_s >= 0.01
    ]
    return "; ".join(parts) or "nobody waits"
