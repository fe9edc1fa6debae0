"""A run whose wall clock jumps, in every one of its processes, ends like any other.

Clocks of machines are set, forwards and backwards. What decides (deadlines, heartbeats, order, what
goes on from what) may not ask them; they stand in records alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.monkey import Planned, find_through_ray
from tests.chaos.run import chaotic_run
from tests.chaos.subject import Subject

STEPS = 30
HOUR_S = 3600.0

# Python runs a `sitecustomize` that it finds in PYTHONPATH as it starts. Only the processes of the run
# have the folder there: those of Ray's nodes keep their clock.
JUMPING = """
import itertools, time

real, numbers = time.time, itertools.count()
jumps = (0.0, 26 * 3600.0, -26 * 3600.0, 60.0, -400 * 86400.0)

def jumping():
    return real() + jumps[next(numbers) % len(jumps)]

time.time = jumping
"""


@pytest.mark.timeout(900)
def test_a_run_whose_clock_jumps_in_all_its_processes_loses_nothing(
    ray_address: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(JUMPING, encoding="utf-8")
    subject = Subject(folder=tmp_path, address=ray_address, steps=STEPS, name="jumping-clock")
    kills = [Planned(role="generation", moment="during generation", chance=0.5, whole=False)]
    monkey, report = chaotic_run(subject, kills, find_through_ray(subject), print)
    assert report.violations == [], subject.output.read_text()[-4000:]
    assert [kill.role for kill in monkey.kills] == ["generation"]
    assert report.groups_trained == STEPS * 4
    lines = (subject.path / "metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time_s"] for line in lines]
    assert max(times) - min(times) > HOUR_S, "the clock did jump"
