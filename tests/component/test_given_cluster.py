"""A cluster of emulated nodes of three worker groups, one of which comes late.

`validate --deep` says what finds no place on it, and then that all does; the run waits for the node
that is yet to come, and each of its roles starts on the nodes of its own group.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster as RayCluster

from rlhf_cluster.planning.placement import group_resource
from tests.chaos.monkey import ACTOR
from tests.chaos.processes import descendants, marked

ROLES = {
    "GenerationActor": "generation",
    "ScoringActor": "scoring",
    "RankActor": "training",
    "BufferActor": "training",
}
SEEN_WITHIN_S = 300.0


def test_a_plan_is_held_against_the_nodes_and_each_role_starts_on_those_of_its_group(
    ray_cluster: RayCluster, start_run: Callable[..., Any], tmp_path: Path
) -> None:
    nodes: dict[str, Any] = {}

    def add(group: str) -> None:
        nodes[group] = ray_cluster.add_node(num_cpus=4, resources={group_resource(group): 1})

    def validate(node_timeout_s: float) -> tuple[int, str]:
        [config] = tmp_path.glob("run-*.toml")
        where = [
            f"cluster.address={ray_cluster.address}",
            f"cluster.node_timeout_s={node_timeout_s}",
        ]
        command = [sys.executable, "-m", "rlhf_cluster.cli", "validate", str(config), "--deep"]
        settings = [word for setting in where for word in ("--set", setting)]
        done = subprocess.run([*command, *settings], capture_output=True, text=True, timeout=300)
        [line] = [text for text in done.stdout.splitlines() if " placement " in text] or [
            done.stderr
        ]
        return done.returncode, line

    try:
        add("generation")
        add("scoring")
        run = start_run(
            run={"steps": 3, "groups_per_step": 2},
            algorithm={"type": "grpo", "group_size": 2},
            generation={"workers": 2},
            cluster={"worker_groups": True, "node_timeout_s": 600.0},
        )
        code, line = validate(0.0)
        assert code == 1
        assert line.startswith("wrong")
        assert "no room for learner-0 (0.25 CPU, 0.001 rlhf_training), buffer (" in line
        assert "generation-0" not in line
        assert "0.25 CPU" in line
        run.script(generate_delay_s=1.0)  # steps enough to look at
        until(lambda: where_roles_run(run, nodes, tmp_path).keys() >= {"GenerationActor"}, run)
        assert "RankActor" not in where_roles_run(run, nodes, tmp_path), "it has no place yet"
        add("training")
        until(lambda: where_roles_run(run, nodes, tmp_path).keys() == ROLES.keys(), run)
        assert where_roles_run(run, nodes, tmp_path) == {k: {v} for k, v in ROLES.items()}
        code, line = validate(0.0)
        assert code == 0, line
        assert line.startswith("ok")
        assert "room for all; bundles: 5, nodes: 4" in line
        run.script()
        code, output = run.finish(300)
        assert code == 0, output
        assert "waiting: no room for learner-0 (0.25 CPU, 0.001 rlhf_training)" in output
    finally:
        for node in nodes.values():
            ray_cluster.remove_node(node)


def where_roles_run(run: Any, nodes: dict[str, Any], word: Path) -> dict[str, set[str]]:
    """The groups of nodes on which processes of each role of the run are; "" is the head."""
    groups = {
        pid: group
        for group, node in nodes.items()
        for pid in descendants(node.all_processes["raylet"][0].process.pid)
    }
    found: dict[str, set[str]] = {}
    for process in marked(str(word)):
        match = ACTOR.match(process.command())
        if match and match[1] in ROLES:
            found.setdefault(match[1], set()).add(groups.get(process.pid, ""))
    return found


def until(condition: Callable[[], bool], run: Any) -> None:
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not condition():
        assert run.process.poll() is None, run.output()
        assert time.monotonic() < deadline, run.output()
        time.sleep(0.1)
