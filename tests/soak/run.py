"""A long tiny run on real Ray, with a scripted engine, that must not grow: memory and open files of
every process, the stores on disk, the object store.

    python -m tests.soak.run --steps 2000 --out benchmarks/results/soak.json

The run is sampled from outside (`sampling.py`), its slopes are held against `BOUNDS` (`trends.py`), and
what it leaves is read by the checker of the chaos runs. The exit status is 0 when nothing is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.harness import machine, versions
from benchmarks.listing import code_of
from tests.chaos.checker import check
from tests.chaos.processes import descendants, of_pid
from tests.chaos.run import local_cluster
from tests.chaos.subject import FEATURES, Subject
from tests.soak.sampling import of_disk, of_processes, totals
from tests.soak.trends import Sample, tail, trends, violations

BOUNDS = {
    "heap_mib": 8.0,
    "shared_mib": 2.0,
    "files": 2.0,
    "disk_mib": 1.0,
    "disk_files": 2.0,
    "objects": 1.0,
    "record_mib": 32.0,
    "ray_heap_mib": 8.0,
    "ray_shared_mib": 2.0,
    "ray_files": 2.0,
}
"""The largest growth of a series in 1,000 steps, by kind. A record grows by design, by so much."""
LASTING = ("heap_mib/",)
"""Every process of the run lives from its start to the end."""
CLUSTER_ENVIRONMENT = {"RAY_task_events_max_num_task_in_gcs": "1000"}
"""Ray keeps the last so many tasks for its dashboard: a table that is full before the measured part."""
EVERY_S = 2.0
START_WITHIN_S = 300.0
STEP_WITHIN_S = 120.0


def sampled(
    subject: Subject, every_s: float, objects: Callable[[], dict[str, float]]
) -> list[Sample]:
    """One sample each `every_s` while the run trains.

    Waits for: its end. Raises `Stuck` where it ends before its first step, or makes no step for
    `STEP_WITHIN_S`.
    """
    subject.wait(lambda: (subject.status() or {"step": 0})["step"], "a step", START_WITHIN_S, 0.2)
    samples: list[Sample] = []
    while subject.ended() is None:
        status = subject.status()
        if status is not None and status["state"] == "running":
            sample = Sample(step=status["step"], values=values_of(subject, objects))
            now = subject.status()
            if now is not None and now["step"] < subject.steps:  # later its processes end
                samples.append(sample)
        last, until = status["step"] if status else 0, time.monotonic() + every_s
        while subject.ended() is None and time.monotonic() < until:
            time.sleep(0.1)
        _makes_steps(subject, last)
    return samples


def _makes_steps(subject: Subject, last: int) -> None:
    """Waits for: a step after `last`, or the end."""

    def moved() -> bool:
        status = subject.status()
        return (
            subject.ended() is not None
            or status is None
            or status["step"] != last
            or (status["state"] != "running")
        )

    if not moved():
        subject.wait(moved, f"a step after {last}", STEP_WITHIN_S, 0.1)


def values_of(subject: Subject, objects: Callable[[], dict[str, float]]) -> dict[str, float]:
    mine = subject.processes()
    own = {process.pid for process in mine} | {os.getpid()}
    ray = [of_pid(pid) for pid in descendants(os.getpid()) - own]
    return {
        **of_processes(mine, [process for process in ray if process is not None]),
        **of_disk(subject.path),
        **objects(),
    }


def object_store(address: str) -> Callable[[], dict[str, float]]:
    """What tells how many bytes and objects the cluster's object store holds."""
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    state = get_state_from_address(address)

    def look() -> dict[str, float]:
        stats = get_memory_info_reply(state).store_stats
        return {
            "objects/bytes_mib": stats.object_store_bytes_used / 2**20,
            "objects/count": float(stats.num_local_objects),
        }

    return look


def figures(samples: Sequence[Sample], steps: int, seconds: float, wrong: int) -> dict[str, float]:
    """The numbers that may be quoted; each slope is the largest of its kind, per 1,000 steps."""
    found, counted = trends(samples, steps), tail(samples, steps)
    slopes: dict[str, float] = {}
    for name, trend in found.items():
        kind = name.rpartition("/")[0]
        for key, slope in ((f"slope/{kind}", trend.slope), (f"late/{kind}", trend.late)):
            slopes[key] = max(slopes.get(key, slope), slope)
    ends = (counted[0].values, counted[-1].values) if counted else ({}, {})
    return {
        "steps": steps,
        "seconds": round(seconds, 1),
        "samples": len(samples),
        "processes": sum(name.startswith("heap_mib/") for name in ends[1]),
        "violations": wrong,
        **{key: round(slope, 3) for key, slope in sorted(slopes.items())},
        **{
            f"{when}/{kind}": round(totals(values, kind), 1)
            for when, values in zip(("from", "to"), ends, strict=True)
            for kind in ("heap_mib", "files", "disk_mib", "record_mib")
        },
    }


def main(command: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--every", type=float, default=EVERY_S, help="seconds between two samples")
    parser.add_argument("--out", type=Path, help="where the result goes, as JSON")
    arguments = parser.parse_args(command)
    os.environ |= CLUSTER_ENVIRONMENT
    facts, start = machine(), time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    with local_cluster() as (address, _):
        subject = Subject(
            folder=folder,
            address=address,
            steps=arguments.steps,
            name=f"soak-{os.getpid()}",
            features=tuple(FEATURES),
            changes={"checkpoint": {"every": 10}},
        )
        try:
            subject.start()
            samples = sampled(subject, arguments.every, object_store(address))
        finally:
            subject.end()
        report = check(
            subject.path, subject.asked, subject.remains(), subject.mirror, subject.copies
        )
    wrong = [str(violation) for violation in report.violations]
    wrong += violations(samples, arguments.steps, BOUNDS, LASTING)
    result = {
        "machine": facts,
        "versions": versions(),
        "command": "python -m tests.soak.run " + " ".join(command),
        "date": datetime.now(UTC).date().isoformat(),
        "code": code_of("soak"),
        "figures": figures(samples, arguments.steps, time.monotonic() - start, len(wrong)),
        "bounds": BOUNDS,
        "violations": wrong,
        "runs": {name: asdict(t) for name, t in trends(samples, arguments.steps).items()},
    }
    tell(result)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(rounded(result), indent=1) + "\n", encoding="utf-8")
    if wrong:
        (folder / "samples.json").write_text(json.dumps([asdict(s) for s in samples]))
        print(f"it lies in {folder}", flush=True)
    else:
        subject.remove()
    return 1 if wrong else 0


def tell(result: dict[str, Any]) -> None:
    for name, trend in result["runs"].items():
        if not trend["slope"]:
            continue
        text = (
            f"{trend['slope']:+9.3f} in 1,000 steps, {trend['first']:9.2f} to {trend['last']:9.2f}"
        )
        print(f"{name:32} {text}")
    print(json.dumps(result["figures"], indent=1))
    for text in result["violations"]:
        print(text)


def rounded(value: Any) -> Any:
    """Four digits behind the point are more than was measured."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return round(value, 4) if isinstance(value, float) else value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
