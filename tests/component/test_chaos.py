"""One run under SIGKILL, read by a checker that knows nothing of the product (tests/chaos)."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from tests.chaos.monkey import NODE, Planned, find_through_ray
from tests.chaos.nodes import Nodes
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
    """Rewards have a pool of their own: a group is scored by one worker and joined by another."""
    pools = {"rewards": {"serves": ["exact_match"], "num_cpus": 0.25}}
    subject = Subject(
        folder=tmp_path,
        address=ray_address,
        steps=STEPS,
        name="under-chaos",
        changes={"scoring": {"pools": pools}},
    )
    monkey, report = chaotic_run(subject, KILLS, find_through_ray(subject), print)
    assert report.violations == [], subject.output.read_text()[-4000:]
    assert [kill.role for kill in monkey.kills] == [kill.role for kill in KILLS]
    by_itself = {kill.role for kill in monkey.kills if not kill.restarted}
    assert {"generation", "scoring", "learner"} <= by_itself, "only the driver needs the command"
    assert report.groups_trained == STEPS * 4
    assert report.lives == 1 + len(subject.ends)
    assert report.rewinds >= 1, "the driver was killed after a checkpoint"


@pytest.mark.timeout(900)
def test_the_loss_of_a_node_takes_its_workers_and_objects_and_no_group(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    """Head and node hold the run together, and neither does alone."""
    subject = Subject(
        folder=tmp_path,
        address=ray_cluster.address,
        steps=20,
        name="under-node-loss",
        changes={"generation": {"num_cpus": 3.0}, "learner": {"num_cpus": 3.0}},
    )
    nodes = Nodes(cluster=ray_cluster, wanted=1, num_cpus=7)
    kills = [Planned(role=NODE, moment="after a checkpoint", chance=0.5, whole=False)]
    try:
        nodes.refill()
        monkey, report = chaotic_run(subject, kills, find_through_ray(subject), print, nodes)
    finally:
        nodes.close()
    assert report.violations == [], subject.output.read_text()[-4000:]
    [kill] = monkey.kills
    assert kill.role == NODE
    assert kill.took, "part of the run was on it"
    assert not kill.restarted, "the run went on by itself"
    assert report.groups_trained == 20 * 4
