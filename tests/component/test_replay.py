"""A run that replays, under SIGKILL, read by a checker that knows nothing of the product."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf_cluster.observe.list_groups import GroupFilter, list_groups
from rlhf_cluster.run.run_record import read_metrics
from tests.chaos.monkey import Planned, find_through_ray
from tests.chaos.run import chaotic_run
from tests.chaos.subject import Subject

STEPS = 24
REPLAY: dict[str, Any] = {"fraction": 0.5, "max_uses": 3, "priority": "reward_spread"}
KILLS = [
    Planned(role="learner", moment="step boundary", chance=0.5),
    Planned(role="driver", moment="after a checkpoint", chance=0.5),
]


@pytest.mark.timeout(900)
def test_a_killed_run_that_replays_trains_no_group_more_often_than_allowed(
    ray_address: str, tmp_path: Path
) -> None:
    """Of four groups a step two are fresh."""
    subject = Subject(
        folder=tmp_path,
        address=ray_address,
        steps=STEPS,
        max_staleness=6,
        name="replaying",
        changes={"buffer": {"replay": REPLAY}},
    )
    monkey, report = chaotic_run(subject, KILLS, find_through_ray(subject), print)
    assert report.violations == [], subject.output.read_text()[-4000:]
    assert [kill.role for kill in monkey.kills] == [kill.role for kill in KILLS]
    assert report.rewinds >= 2
    assert report.groups_trained == STEPS * 2
    records = [r for r in read_metrics(subject.path / "metrics.jsonl") if "replay/groups" in r]
    assert len(records) == STEPS
    replayed = sum(r["replay/groups"] for r in records)
    assert sum(r["replay/groups"] + r["replay/missing_groups"] for r in records) == STEPS * 2
    assert replayed > STEPS // 2
    assert report.rollouts == (STEPS * 2 + replayed) * 4
    rows = list_groups(subject.path, GroupFilter()).rows
    assert sum(len(row.steps) for row in rows) == STEPS * 2 + replayed
    assert 1 < max(len(row.steps) for row in rows) <= REPLAY["max_uses"]
