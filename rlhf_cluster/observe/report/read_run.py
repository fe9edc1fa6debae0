"""Content of a run directory at this moment, as far as a report shows it.

Everything but the directory itself may be missing, half written by a running process, or damaged; what
cannot be read is named in `problems` and skipped.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf_cluster.errors import RlhfError
from rlhf_cluster.observe.record import post_mortem
from rlhf_cluster.observe.record.samples import Row, read_samples
from rlhf_cluster.observe.report.learning_curve import held_out_name, held_out_series
from rlhf_cluster.run.bottleneck_advisor import advise
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Event, Snapshot, read_metrics

MAX_STEPS_SHOWN = 8
SAMPLES_OF_A_STEP = 6
LAST_STEPS = 8  # from whose samples the best and the worst are chosen
EXTREMES = 3
SAMPLE_COLUMNS = (
    "rollout_id", "prompt_id", "prompt", "response", "reward", "reward_parts", "version_min",
    "version_max", "staleness", "finish_reason", "worker", "scorer",
)  # fmt: skip
"""Columns of samples that a report cannot do without."""
MAX_EVENTS = 200
_EVENT = re.compile(
    r"^(\S+Z) \w+ controller controller actors\.drivers\.(?:run|rl)_observer: (.*)$"
)
_ROUTINE = re.compile(r"step \d+: reward |group \S+ was on disk|checkpoint of step \d+ is complete")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """Event, with its time as in the log (UTC, ISO 8601)."""

    time: str
    text: str


@dataclass(slots=True, kw_only=True)
class RunRecord:
    """Record of a run. `samples` are by step; `best` and `worst` are of different prompts.

    `active`: a process holds the run now.
    """

    path: Path
    active: bool
    snapshot: Snapshot | None = None
    records: list[dict[str, Any]] = field(default_factory=list)
    samples: dict[int, list[Row]] = field(default_factory=dict)
    best: list[Row] = field(default_factory=list)  # each with its "step"
    worst: list[Row] = field(default_factory=list)
    events: list[LoggedEvent] = field(default_factory=list)
    advice: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    first_cause: str | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.snapshot.run if self.snapshot else self.path.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Records of training steps."""
        return [record for record in self.records if record.get("reward/mean") is not None]

    @property
    def watched(self) -> list[str]:
        """Metrics of an offline stage: its headline metric."""
        s = self.snapshot
        return [s.metric] if s is not None and s.stage is not None and s.metric else []

    @property
    def parts(self) -> list[str]:
        """Metrics of the reward's parts and of watched rewards.

        Of their details only the disagreement of an ensemble is among them.
        """
        found = {n for r in self.records for n in r if n.startswith("reward/part/")}
        return sorted(n for n in found if "." not in n or n.endswith(".disagreement"))

    @property
    def headline(self) -> str:
        """Metric that the run is about: the reward or, of a stage, what it is watched by."""
        return self.watched[0] if self.watched else "reward/mean"

    @property
    def held_out(self) -> dict[str, list[tuple[float, float]]]:
        """Points of each recorded held-out series of the headline metric, by its label."""
        names = {name for record in self.records for name in record}
        if self.watched:
            own = held_out_name(self.watched[0])
            found = {own: "held-out"} if own in names else {}
        else:
            found = held_out_series(names)
        series = {label: self.points(name) for name, label in found.items()}
        return {label: points for label, points in series.items() if points}

    def points(self, name: str) -> list[tuple[float, float]]:
        """Return step and value of one metric at the steps that have it."""
        found = ((r["step"], r.get(name)) for r in self.records)
        return [(float(step), float(value)) for step, value in found if value is not None]


def read_run(run: RunDir) -> RunRecord:
    """Read all of it. Raises only the `OSError` of a directory that is deleted meanwhile."""
    found = RunRecord(path=run.path, active=run.is_held())
    try:
        found.snapshot = run.read_status()
    except RlhfError as error:
        found.problems.append(str(error))
    try:
        found.records = read_metrics(run.metrics)
    except RlhfError as error:
        found.problems.append(str(error))
    found.config = run.read_resolved() or {}
    found.events = _events(run, found.snapshot)
    found.first_cause = _first_cause(run.path / post_mortem.NAME)
    advice = advise(found.records)
    found.advice = None if advice is None else advice.text
    _read_samples(run, found)
    return found


def _read_samples(run: RunDir, found: RunRecord) -> None:
    paths = sorted(run.samples.glob("step-*.parquet"))
    spread, last = _spread(paths, MAX_STEPS_SHOWN), paths[-LAST_STEPS:]
    pool: list[Row] = []
    for path in sorted({*spread, *last}):
        try:
            step, rows = int(path.stem.removeprefix("step-")), read_samples(path)
            if missing := [name for name in SAMPLE_COLUMNS if rows and name not in rows[0]]:
                raise ValueError(f"it has no {', '.join(missing)}")
        # The last for damage that pyarrow takes for what it does not support.
        except (OSError, ValueError, KeyError, NotImplementedError) as error:
            found.problems.append(f"{path}: cannot be read as samples ({error})")
            continue
        if path in last:
            pool += [{**row, "step": step} for row in rows]
        if path in spread:
            ranked = sorted(rows, key=lambda row: row["reward"], reverse=True)
            found.samples[step] = _ends(ranked, SAMPLES_OF_A_STEP)
    found.best, found.worst = choose_extremes(pool, EXTREMES)


def choose_extremes(rows: Sequence[Row], limit: int) -> tuple[list[Row], list[Row]]:
    """Return the best and the worst rows, of a prompt one at most; newer ones first among equals."""
    ranked = sorted(rows, key=lambda row: (row["reward"], row["step"]), reverse=True)
    best = _by_prompt(ranked, limit, set())
    rising = sorted(rows, key=lambda row: (row["reward"], -row["step"]))
    return best, _by_prompt(rising, limit, {row["prompt_id"] for row in best})


def _by_prompt(ranked: Sequence[Row], limit: int, without: set[str]) -> list[Row]:
    chosen: dict[str, Row] = {}
    for row in ranked:
        if len(chosen) == limit:
            break
        if row["prompt_id"] not in without:
            chosen.setdefault(row["prompt_id"], row)
    return list(chosen.values())


def _spread(paths: Sequence[Path], limit: int) -> list[Path]:
    """Return the first, the last, and some between them, evenly."""
    if len(paths) <= limit:
        return list(paths)
    return [paths[round(i * (len(paths) - 1) / (limit - 1))] for i in range(limit)]


def _ends(rows: Sequence[Row], limit: int) -> list[Row]:
    """Return the best and the worst."""
    if len(rows) <= limit:
        return list(rows)
    return [*rows[: limit - limit // 2], *rows[-(limit // 2) :]]


def _events(run: RunDir, snapshot: Snapshot | None) -> list[LoggedEvent]:
    """Return the events of the controller's log or, without one, the few in the snapshot."""
    try:
        text = (run.logs / "controller.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return [_add_iso_time(event) for event in snapshot.events] if snapshot else []
    events = [
        LoggedEvent(time=match[1], text=match[2])
        for line in text.splitlines()
        if (match := _EVENT.match(line)) and not _ROUTINE.match(match[2])
    ]
    return events[-MAX_EVENTS:]


def _add_iso_time(event: Event) -> LoggedEvent:
    time = datetime.fromtimestamp(event.time_s, UTC).isoformat(timespec="milliseconds")
    return LoggedEvent(time=f"{time.removesuffix('+00:00')}Z", text=event.text)


def _first_cause(path: Path) -> str | None:
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["first_cause"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
