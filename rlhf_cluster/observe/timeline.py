"""Timeline of a run for Perfetto (https://ui.perfetto.dev) and chrome://tracing.

    learner      of every step: waiting for groups, training, copy of the weights (metrics.jsonl)
    generation   a span per stored group: from its first to its last token, by worker
    counters     reward, staleness, buffer, live workers, live version
    events       messages of the controller: restarts, discards, scaling, states

Promises: times are microseconds since the first thing shown; no span begins before 0 or has a negative
length; the learner's spans do not overlap. A step's spans are laid out backwards from the time at which
it was recorded, in the order in which they happen, so they are right to within the time of recording.

Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import StoreError
from rlhf_cluster.observe.report.read_run import LoggedEvent, RunRecord, read_run
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.durable_files import write_all

LEARNER, GENERATION, COUNTERS, EVENTS = 1, 2, 3, 4
NAMES = {LEARNER: "learner", GENERATION: "generation", COUNTERS: "counters", EVENTS: "events"}
SPANS = (
    ("time/learner_wait_s", "wait for groups"),
    ("time/train_s", "train"),
    ("time/publish_wait_s", "copy weights"),
)
COUNTED = (
    *("reward/mean", "staleness/max", "buffer/in_flight", "buffer/ready", "weights/version_live"),
    *("pool/size", "step/tokens_per_s"),
)

Event = dict[str, Any]


def write_timeline(run: RunDir, path: Path) -> int:
    """Write the trace as JSON; return its number of events."""
    found = timeline(read_run(run), list(_groups(run)))
    write_all(path, json.dumps({"traceEvents": found, "displayTimeUnit": "ms"}).encode())
    return len(found)


def timeline(run: RunRecord, groups: Sequence[Event]) -> list[Event]:
    """Return all events by time. `groups` are those of `_groups`, with times in unix seconds."""
    timed = [*_steps(run), *_counters(run), *map(_message, run.events), *groups]
    start_s = min((event["ts"] for event in timed), default=0.0)
    for event in timed:
        event["ts"] = round(1e6 * (event["ts"] - start_s))
        if "dur" in event:
            event["dur"] = round(1e6 * event["dur"])
    timed.sort(key=lambda event: event["ts"])
    return [*_names(groups), *timed]


def _steps(run: RunRecord) -> Iterator[Event]:
    end_of_last = 0.0
    for record in run.steps:
        if record.get("time/step_s") is None:
            continue
        spans = [(name, record.get(key) or 0.0) for key, name in SPANS]
        at = max(end_of_last, record["time_s"] - sum(seconds for _, seconds in spans))
        for name, seconds in spans:
            seconds = min(seconds, max(0.0, record["time_s"] - at))
            yield {
                "name": f"{name} {record['step']}",
                "ph": "X",
                "pid": LEARNER,
                "tid": 0,
                "ts": at,
                "dur": seconds,
                "args": {"step": record["step"], "reward": record["reward/mean"]},
            }
            at += seconds
        end_of_last = at


def _counters(run: RunRecord) -> Iterator[Event]:
    for record in run.records:
        for name in (own for own in record if own.startswith(COUNTED)):
            if record[name] is not None:
                yield {
                    "name": name,
                    "ph": "C",
                    "pid": COUNTERS,
                    "tid": 0,
                    "ts": record["time_s"],
                    "args": {"value": record[name]},
                }


def _message(event: LoggedEvent) -> Event:
    time_s = datetime.fromisoformat(event.time).timestamp()
    return {
        "name": event.text[:200],
        "ph": "i",
        "s": "g",
        "pid": EVENTS,
        "tid": 0,
        "ts": time_s,
        "args": {"text": event.text[:4000]},
    }


def _groups(run: RunDir) -> Iterator[Event]:
    """Yield two events per stored group: groups of one worker overlap, so spans are asynchronous.

    A damaged file is skipped.
    """
    store = ExperienceStore(run.path / "experience")
    for number in store.numbers():
        try:
            group = store.read(number)
        except StoreError:
            continue
        rollouts = [scored.rollout for scored in group.scored]
        base = {
            "name": group.group_id,
            "cat": rollouts[0].worker,
            "id": number,
            "pid": GENERATION,
            "tid": 0,
        }
        reward = sum(scored.reward for scored in group.scored) / len(rollouts)
        facts = {"reward": reward, "version": group.ticket.version, "prompt": rollouts[0].prompt_id}
        yield {**base, "ph": "b", "ts": min(r.started_s for r in rollouts), "args": facts}
        yield {**base, "ph": "e", "ts": max(r.finished_s for r in rollouts)}


def _names(groups: Sequence[Event]) -> Iterator[Event]:
    for pid, name in NAMES.items():
        if pid != GENERATION or groups:
            yield {"name": "process_name", "ph": "M", "pid": pid, "tid": 0, "args": {"name": name}}
