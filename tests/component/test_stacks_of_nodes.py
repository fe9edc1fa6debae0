"""A process of another host is asked by a task on its node."""

from __future__ import annotations

import socket
from pathlib import Path

import ray

from actors.cluster.stacks_of_nodes import (
    ask_on,
    nodes_of,
)
from rlhf_cluster.observe.record import stacks


@ray.remote(num_cpus=0)
class Stuck:
    def __init__(self, log_dir: str) -> None:
        stacks.answer(log_dir, "learner-1")

    def up(self) -> bool:
        return True


def test_a_task_on_the_node_asks_its_processes_and_nodes_of_other_hosts_are_left_out(
    ray_cluster, tmp_path: Path
):
    actor = Stuck.remote(str(tmp_path))
    assert ray.get(actor.up.remote(), timeout=120)
    nodes = nodes_of({socket.gethostname()}, ray.nodes())
    assert list(nodes) == [socket.gethostname()]
    assert nodes_of({"another-host"}, ray.nodes()) == {}
    told = ask_on(nodes, tmp_path)
    assert list(told) == ["learner-1"]
    assert any("most recent call first" in line for line in told["learner-1"])
    ray.kill(actor)


def test_a_node_that_died_costs_nobody_elses_stacks(ray_cluster, tmp_path: Path):
    actor = Stuck.remote(str(tmp_path))
    assert ray.get(actor.up.remote(), timeout=120)
    gone = {"gone-host": "0" * 56}
    told = ask_on(nodes_of({socket.gethostname()}, ray.nodes()) | gone, tmp_path)
    assert list(told) == ["learner-1", "gone-host"]
    assert "this host could not be asked" in told["gone-host"][0]
    ray.kill(actor)
