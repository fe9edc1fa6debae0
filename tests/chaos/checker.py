"""What a finished run directory says about the run, read without any code of the product.

`check` reads the files as anyone could (JSON lines, Parquet, safetensors, logs) and holds them against
what was asked. Every group that was admitted must have been trained exactly once (with replay: by no
more steps than allowed) or be discarded with a reason; every step must be there once, with as many
groups as asked; no trained token may be staler than the bound; versions may go back only where the logs
say that the run started anew or went back to a checkpoint; nothing of it may be alive, half written or
left over. What is wrong is a `Violation`, never an exception: also a file that is missing or cannot be
read.

The record of a run that was killed is its last one: what came after the checkpoint from which it went
on was taken back by the product, and is not counted.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.parquet as parquet
from safetensors import SafetensorError

from tests.chaos.reading import not_finite, ranges, read_json, read_log, read_metrics

DISCARD = re.compile(r"group (g\d{8,}) discarded: (.*)")
NEVER = "~"  # after every time
STEP = re.compile(r"step (\d+): ")
BACK = re.compile(r"from (?:the|its) checkpoint of step (\d+)|goes on from the beginning")
PROMPT = re.compile(r"(\d+)-e0")  # place in a stream of prompts that does not repeat
STARTING = re.compile(r"starting$")
LIVE = re.compile(r"version (\d+)(?: is)? live\b")
NEW_PROCESS = re.compile(r"(admitting by|engine up|set up: )")
T = TypeVar("T")
TRAINED = "learner/loss"  # every record of a training step has it


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the run was asked to do."""

    steps: int
    groups_per_step: int
    group_size: int
    max_staleness: int
    replayed: int = 0  # groups of a step that may be such as were trained before
    max_uses: int = 1  # steps that may train a group


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation:
    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"


@dataclass(slots=True, kw_only=True)
class Report:
    """Counts, and everything that is wrong, in plain English."""

    steps: int = 0
    groups_admitted: int = 0
    groups_trained: int = 0
    groups_discarded: int = 0
    groups_lost: int = 0
    groups_trained_twice: int = 0
    bound_violations: int = 0
    staleness_max: int = 0
    rollouts: int = 0
    lives: int = 0  # starts of the driver
    rewinds: int = 0  # returns to a checkpoint
    orphans: int = 0
    violations: list[Violation] = field(default_factory=list)

    def found(self, kind: str, text: str) -> None:
        self.violations.append(Violation(kind=kind, text=text))


def check(
    run: Path,
    asked: Asked,
    orphans: Mapping[int, str] | None = None,
    mirror: Path | None = None,
    copies: Path | None = None,
) -> Report:
    """Read what a run left behind.

    `orphans` are its processes that are still alive (`processes.py`), by id; `mirror` is the folder
    of the relay's copies of its versions, `copies` that of the second copies of its checkpoints.
    """
    report = Report()
    groups = _samples(run, asked, report)
    _outcome(run, asked, report)
    _steps(run, asked, report)
    _groups(run, asked, groups, report)
    _experience(run, groups, report)
    _logs(run, report)
    _checkpoints(run, asked, report)
    _weights(run, asked, report)
    if mirror is not None:
        _mirror(mirror, report)
    if copies is not None:
        _copies(copies / run.name, asked, report)
    for pid, command in sorted((orphans or {}).items()):
        report.orphans += 1
        report.found("orphan", f"process {pid} ({command}) outlived the run")
    return report


def _samples(run: Path, asked: Asked, report: Report) -> dict[str, list[int]]:
    """The steps in which each group was trained; checks every rollout on the way."""
    trained: dict[str, list[int]] = {}
    places: dict[str, int] = {}
    rollouts: Counter[str] = Counter()
    missing: list[int] = []
    for step in range(1, asked.steps + 1):
        path = run / "samples" / f"step-{step:06d}.parquet"
        if not path.exists():
            missing.append(step)
            continue
        rows = _guarded(report, path, lambda p=path: parquet.read_table(p).to_pylist())
        if rows is None:
            continue
        sizes = Counter(row["group_id"] for row in rows)
        _batch(step, len(sizes), sum(group not in trained for group in sizes), asked, report)
        for group in sizes:
            trained.setdefault(group, []).append(step)
        rollouts.update(row["rollout_id"] for row in rows)
        for group, size in sorted(sizes.items()):
            if size != asked.group_size:
                report.found(
                    "rollouts",
                    f"step {step}: group {group} has {size} rollouts, asked were {asked.group_size}",
                )
        for row in rows:
            _rollout(row, step, asked, report)
            if place := PROMPT.fullmatch(row["prompt_id"]):
                places[row["rollout_id"]] = int(place[1]) - int(row["group_id"][1:])
    for place in sorted(set(places.values()) - {min(places.values(), default=0)}):
        wrong = next(rollout for rollout in places if places[rollout] == place)
        report.found("prompt", f"rollout {wrong} has the prompt {place} places from its group's")
    if missing:
        report.found("samples missing", f"no samples of {ranges(missing)}")
    for path in sorted((run / "samples").glob("*")):
        number = re.fullmatch(r"step-(\d+)\.parquet", path.name)
        if number is None or not 1 <= int(number[1]) <= asked.steps:
            report.found("leftover", f"{path.name} in samples belongs to no step of the run")
    for rollout, times in rollouts.items():
        if times > asked.max_uses:
            report.found("rollouts", f"rollout {rollout} was trained {times} times")
    report.rollouts = rollouts.total()
    return trained


def _batch(step: int, groups: int, new: int, asked: Asked, report: Report) -> None:
    """As many groups as asked, of which only so many were trained before."""
    fresh = asked.groups_per_step - asked.replayed
    if not fresh <= groups <= asked.groups_per_step:
        wanted = f"{fresh} to {asked.groups_per_step}" if asked.replayed else f"{fresh}"
        report.found("batch", f"step {step} trained {groups} groups, asked were {wanted}")
    elif asked.replayed and new != fresh:
        report.found("batch", f"step {step} trained {new} new groups, asked were {fresh}")


def _rollout(row: Mapping[str, Any], step: int, asked: Asked, report: Report) -> None:
    name, before = row["rollout_id"], step - 1
    oldest, newest = row["version_min"], row["version_max"]
    staleness = before - oldest
    report.staleness_max = max(report.staleness_max, staleness)
    if staleness > asked.max_staleness:
        report.bound_violations += 1
        report.found(
            "staleness",
            f"step {step}: rollout {name} was sampled with version {oldest}, {staleness} behind the "
            f"learner's {before}; the bound is {asked.max_staleness}",
        )
    if row["staleness"] != staleness:
        report.found(
            "versions",
            f"step {step}: rollout {name} says staleness {row['staleness']}: {staleness}",
        )
    if not 0 <= oldest <= newest <= before:
        report.found(
            "versions",
            f"step {step}: rollout {name} has versions {oldest} to {newest}; the learner had {before}",
        )
    if not 0 < len(row["response_ids"]) == len(row["sampled_logprobs"]):
        report.found("rollouts", f"step {step}: rollout {name} has not one log-probability a token")


def _outcome(run: Path, asked: Asked, report: Report) -> None:
    status = _guarded(report, run / "status.json", lambda: read_json(run / "status.json"))
    summary = _guarded(report, run / "summary.json", lambda: read_json(run / "summary.json"))
    if status is not None and (status["state"], status["step"]) != ("finished", asked.steps):
        report.found("unfinished", f"status.json says {status['state']} at step {status['step']}")
    if summary is not None and summary["steps"] != asked.steps:
        report.found("unfinished", f"summary.json says {summary['steps']} steps")


def _steps(run: Path, asked: Asked, report: Report) -> None:
    records = _guarded(report, run / "metrics.jsonl", lambda: read_metrics(run))
    if records is None:
        return
    trained = [record for record in records if TRAINED in record]
    times = Counter(record["step"] for record in trained)
    report.steps = len(times)
    if missing := [step for step in range(1, asked.steps + 1) if times[step] == 0]:
        report.found("step missing", f"not in metrics.jsonl: {ranges(missing)}")
    if twice := [step for step, number in sorted(times.items()) if number > 1]:
        report.found("step twice", f"more than once in metrics.jsonl: {ranges(twice)}")
    for step in sorted(times.keys() - set(range(1, asked.steps + 1))):
        report.found("steps", f"step {step} in metrics.jsonl was never asked for")
    for record in trained:
        if (record.get("staleness/max") or 0) > asked.max_staleness:
            report.bound_violations += 1
            report.found(
                "staleness",
                f"step {record['step']}: staleness/max {record['staleness/max']:g} in "
                f"metrics.jsonl; the bound is {asked.max_staleness}",
            )
    for name in ("weights/version_published", "weights/version_live"):
        _rising(report, "metrics.jsonl", [(r["step"], r[name]) for r in trained if name in r], name)


def _rising(report: Report, where: str, values: Sequence[tuple[Any, float]], name: str) -> None:
    for (_, before), (at, value) in itertools.pairwise(values):
        if value < before:
            report.found(
                "version back", f"{where}: {name} went back from {before:g} to {value:g} ({at})"
            )


def _groups(run: Path, asked: Asked, trained: Mapping[str, list[int]], report: Report) -> None:
    """Each admitted group: trained as often as allowed, or discarded with a reason, and the counters
    agree."""
    numbers = {int(group[1:]) for group in trained}
    counted = _last_buffer(run, asked, report)
    report.groups_admitted = counted["admitted"] if counted else max(numbers, default=-1) + 1
    report.groups_trained = len(trained)
    reasons = _discards(run)
    for number in range(report.groups_admitted):
        group = f"g{number:08d}"
        steps = trained.get(group, [])
        if len(steps) > asked.max_uses:
            report.groups_trained_twice += 1
            report.found("group twice", f"group {group} was trained in {ranges(steps)}")
        elif not steps and reasons.get(group, "").strip():
            report.groups_discarded += 1
        elif not steps:
            report.groups_lost += 1
            report.found(
                "group lost", f"group {group} was neither trained nor discarded with a reason"
            )
    for number in sorted(n for n in numbers if n >= report.groups_admitted):
        report.found("group unknown", f"group g{number:08d} was trained and never admitted")
    if counted:
        _counters(counted, report)


def _experience(run: Path, trained: Mapping[str, list[int]], report: Report) -> None:
    """What the store of groups says of their steps is what the samples say."""
    path = run / "experience" / "trained.json"
    if not path.is_file():
        return
    found = _guarded(report, path, lambda: dict(read_json(path)))
    for number, recorded in (found or {}).items():
        steps = trained.get(f"g{int(number):08d}", recorded)
        if steps != recorded:
            report.found(
                "experience",
                f"trained.json has group {number} in {ranges(recorded)}, samples in {ranges(steps)}",
            )


def _counters(counted: Mapping[str, Any], report: Report) -> None:
    discarded = sum(counted["discarded"].values())
    for what, said, seen in (
        ("taken", counted["taken"], report.groups_trained),
        ("discarded", discarded, report.groups_discarded),
    ):
        if said != seen:
            report.found(
                "counters", f"the last checkpoint counts {said} groups {what}, found: {seen}"
            )
    if counted["open"]:
        tickets = ", ".join(str(ticket["number"]) for ticket in counted["open"])
        report.found("group lost", f"open in the last checkpoint: tickets {tickets}")


def _last_buffer(run: Path, asked: Asked, report: Report) -> dict[str, Any] | None:
    """The buffer's counters in the checkpoint of the last step."""
    path = run / "checkpoints" / f"step-{asked.steps:06d}" / "run.json"
    return _guarded(report, path, lambda: read_json(path)["buffer"])


def _logs(run: Path, report: Report) -> None:
    """Steps go on where a start or a return to a checkpoint says; live versions never go back."""
    returns: list[tuple[str, str]] = []  # to a checkpoint, and the first step after it
    expected: int | None = None
    for line in read_log(run / "logs" / "controller.log"):
        if STARTING.match(line.text):
            report.lives, expected = report.lives + 1, 1
        elif back := BACK.search(line.text):
            report.rewinds, expected = report.rewinds + 1, int(back[1] or 0) + 1
            returns.append((line.time, NEVER))
        elif step := STEP.match(line.text):
            if returns and returns[-1][1] == NEVER:
                returns[-1] = (returns[-1][0], line.time)
            if expected is not None and int(step[1]) != expected:
                report.found(
                    "step order",
                    f"controller.log at {line.time}: step {step[1]} where {expected} had to follow",
                )
            expected = int(step[1]) + 1
    if report.lives == 0:
        report.found("unreadable", "logs/controller.log tells of no start")
    for path in sorted((run / "logs").glob("*.log")):
        if path.stem == "buffer" or path.stem.startswith("generation"):
            _live_versions(path, returns, report)


def _live_versions(path: Path, returns: Sequence[tuple[str, str]], report: Report) -> None:
    """Versions never go back, but from a return to a checkpoint to the first step after it.

    Until then a load of a version that the run left may still end.
    """
    before, seen = -1, ""
    for line in read_log(path):
        if NEW_PROCESS.match(line.text) or any(
            begin <= line.time and seen <= end for begin, end in returns
        ):
            before = -1
        seen = line.time
        if live := LIVE.match(line.text):
            if int(live[1]) < before:
                report.found(
                    "version back",
                    f"{path.name} at {line.time}: version {live[1]} live after {before}",
                )
            before = int(live[1])


def _checkpoints(run: Path, asked: Asked, report: Report) -> None:
    """Those that are there are whole, the last step's among them."""
    folders = sorted(path for path in (run / "checkpoints").glob("*"))
    for path in folders:
        if not re.fullmatch(r"step-\d{6,}", path.name):
            report.found("leftover", f"checkpoints/{path.name} is half written or half removed")
            continue
        marker = _guarded(report, path, lambda p=path: read_json(p / "complete.json")["files"])
        for name, entry in (marker or {}).items():
            if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]:
                report.found("checkpoint", f"{path.name}/{name} is not as complete.json says")
    if f"step-{asked.steps:06d}" not in {path.name for path in folders}:
        report.found("checkpoint", f"there is none of the last step, {asked.steps}")


def _weights(run: Path, asked: Asked, report: Report) -> None:
    """The last version and the exported model can be read and hold numbers; nothing is half written."""
    latest = _guarded(report, run / "weights" / "latest", (run / "weights" / "latest").read_text)
    if latest is not None and latest.strip() != f"v{asked.steps:06d}":
        report.found(
            "weights", f"the latest version is {latest.strip()}, not that of {asked.steps}"
        )
    for path in sorted((run / "weights").glob("*.partial")):
        report.found("leftover", f"weights/{path.name} is half written")
    shards = sorted((run / "weights" / (latest or "").strip()).glob("*.safetensors"))
    for path in [*shards, run / "final" / "model.safetensors"]:
        broken = _guarded(report, path, lambda p=path: list(not_finite(p)))
        for name in broken or ():
            report.found("weights", f"{path.parent.name}/{path.name}: {name} is not finite")


def _mirror(mirror: Path, report: Report) -> None:
    """There were copies, and none is left."""
    if not mirror.is_dir():
        report.found("mirror", f"{mirror.name}: no version was ever copied to it")
        return
    for path in sorted(mirror.iterdir()):
        report.found("leftover", f"{path.name} of the mirror outlived the run")


def _copies(copies: Path, asked: Asked, report: Report) -> None:
    """Every second copy that says that it is complete is, the last step's among them."""
    last = f"step-{asked.steps:06d}"
    for path in sorted(copies.glob("step-*")):
        if (path / "set_aside.json").is_file():
            continue  # of a timeline that the run left
        marker = _guarded(report, path, lambda p=path: read_json(p / "copied.json")["files"])
        for name, entry in (marker or {}).items():
            if not (path / name).is_file() or (path / name).stat().st_size != entry["bytes"]:
                report.found("copy", f"{path.name}/{name} is not as copied.json says")
    if not (copies / last / "copied.json").is_file():
        report.found("copy", f"there is none of the last step, {asked.steps}")


def _discards(run: Path) -> dict[str, str]:
    """Groups that a log says were discarded, with the reason."""
    lines = [
        line for name in ("buffer", "controller") for line in read_log(run / "logs" / f"{name}.log")
    ]
    found = (DISCARD.search(line.text) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _guarded(report: Report, path: Path, read: Callable[[], T]) -> T | None:
    try:
        return read()
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        report.found(
            "unreadable", f"{path.parent.name}/{path.name}: {type(error).__name__}: {error}"
        )
        return None
