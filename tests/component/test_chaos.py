"""One run under SIGKILL, read by a checker that knows nothing of the product (tests/chaos)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.monkey import Planned, find_through_ray
from tests.chaos.run import chaotic_run
from tests.chaos.subject import Subject

STEPS = 44
KILLS = [
    Planned(role="generation", moment="during generation", chance=0.5),
    Planned(role="scoring", moment="step boundary", chance=0.5),
    Planned(role="learner", moment="during a publish", chance=0.5),
    Planned(role="driver", moment="after a checkpoint", chance=0.5),
]


@pytest.mark.timeout(900)
def test_a_run_whose_parts_are_killed_one_after_the_other_trains_every_group_once(
    ray_address: str, tmp_path: Path
) -> None:
    subject = Subject(folder=tmp_path, address=ray_address, steps=STEPS, name="under-chaos")
    monkey, report = chaotic_run(subject, KILLS, find_through_ray(subject), print)
    assert report.violations == [], subject.output.read_text()[-4000:]
    assert [kill.role for kill in monkey.kills] == [kill.role for kill in KILLS]
    by_itself = {kill.role for kill in monkey.kills if not kill.restarted}
    assert {"generation", "scoring", "learner"} <= by_itself, "only the driver needs the command"
    assert report.groups_trained == STEPS * 4
    assert report.lives == 1 + len(subject.ends)
    assert report.rewinds >= 1, "the driver was killed after a checkpoint"
