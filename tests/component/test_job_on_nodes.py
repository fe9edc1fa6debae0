"""One job on a cluster of several nodes, as its owner sees it: submitted and followed by another
process, scaled up and down while it trains, bereft of a node, stopped; and no group is lost.

The cluster is one of its own, with a dashboard. Generation runs on two emulated nodes, one worker each,
and all else on the head. The job runs the real engine: nothing of the tests is sent with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.planning.placement import group_resource
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, read_metrics
from tests.chaos.nodes import Node, Nodes
from tests.support.builders.run_configs import tiny_tree
from tests.support.processes.free_ports import free_ports

WITHIN_S = 300.0
NAME, GROUPS = "on-nodes", 4
POOLS = ("generation", "scoring")

pytestmark = pytest.mark.timeout(1500)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    port, agent = free_ports(2)
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: Ray's sockets lie below it
    ours = {group_resource(role): 1.0 for role in ("scoring", "training")}
    head = {
        "num_cpus": 4,
        "resources": ours,
        "object_store_memory": 256 << 20,
        "include_dashboard": True,
        "dashboard_port": port,
        "dashboard_agent_listen_port": agent,
        "temp_dir": str(folder / "ray"),
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    # As `ray start` does: without it a job takes any cluster of this machine for its own.
    (folder / "ray" / "ray_current_cluster").write_text(cluster.address)
    yield cluster
    cluster.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def nodes(cluster: Cluster) -> Iterator[Nodes]:
    resources = {group_resource("generation"): 1.0}
    nodes = Nodes(cluster=cluster, wanted=2, num_cpus=1, resources=resources, own_folders=True)
    try:
        nodes.refill()
        yield nodes
    finally:
        nodes.close_with_cluster()


def test_a_job_is_followed_scaled_bereft_of_a_node_and_stopped_and_no_group_is_lost(
    cluster: Cluster, nodes: Nodes, tmp_path: Path
) -> None:
    job = Job(f"http://{cluster.webui_url}", tmp_path)
    following = job.submit()
    try:
        job.trains()
        for size in (2, 1):
            said = job.ask("scale", *(f"{pool}={size}" for pool in POOLS)).splitlines()
            assert [line.split() for line in said] == [
                [pool, f"{size}", "workers"] for pool in POOLS
            ]
            job.wait(lambda s, n=size: sizes(s) == dict.fromkeys(POOLS, n), f"{size} workers each")
        job.trains()
        restarts = job.status().pools[0].restarts
        nodes.lose(node_of("GenerationActor", job.address, nodes).raylet)
        job.wait(lambda s: s.pools[0].restarts > restarts, "the loss of the worker is seen")
        job.wait(lambda s: sizes(s)["generation"] == 1, "the other node has a worker")
        job.trains()
        assert job.ask("stop") == f"{NAME}: stopped\n"
        following.wait(WITHIN_S)
    finally:
        following.kill()
    assert job.status().state == "stopped"
    assert "reward" in job.followed()
    last = max(record["step"] for record in read_metrics(job.path / "metrics.jsonl"))
    assert f"step {last}/" in job.followed(), "it was followed to the end"
    trained = job.trained()
    assert trained == list(range(GROUPS * last)), "each group once, in the order of admission"
    assert job.status().buffer_discarded == 0


class Job:
    """One submitted run, by the command line in processes of its own."""

    def __init__(self, address: str, folder: Path) -> None:
        self.address, self.path, self._folder = address, folder / NAME, folder
        tree = tiny_tree(
            run={"steps": 1_000_000, "groups_per_step": GROUPS, "root": str(folder)},
            evaluation={"num_prompts": 0},
            cluster={"heartbeat_s": 1.0, "worker_groups": True},
            observe={"samples_per_step": 1000},
        )
        (folder / "run.toml").write_text(tomli_w.dumps(tree))

    def words(self, command: str, *more: str) -> list[str]:
        what = [NAME, *more]
        if command == "submit":
            what = [str(self._folder / "run.toml"), "--run-id", NAME, "--follow"]
        program = [sys.executable, "-m", "rlhf_cluster.cli"]
        return [*program, command, *what, "--address", self.address]

    def submit(self) -> subprocess.Popen[bytes]:
        """The process that follows it."""
        with (self._folder / "followed").open("w") as out:
            self._following = subprocess.Popen(
                self.words("submit"), stdout=out, stderr=subprocess.STDOUT
            )
        return self._following

    def ask(self, command: str, *more: str) -> str:
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        words = self.words(command, *more)
        done = subprocess.run(
            words, env=environment, capture_output=True, text=True, timeout=2 * WITHIN_S
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{self.followed()}"
        return done.stdout

    def followed(self) -> str:
        return (self._folder / "followed").read_text()

    def died_of(self) -> str:
        left = self.path / "post_mortem.json"
        return self.followed() + (left.read_text()[:4000] if left.exists() else "")

    def status(self) -> Snapshot:
        status = RunDir.open(self.path).read_status() if self.path.exists() else None
        return status or Snapshot(run=NAME, state="starting", step=0, num_steps=1, time_s=0.0)

    def wait(self, found: Callable[[Snapshot], bool], what: str) -> None:
        deadline = time.monotonic() + WITHIN_S
        while not found(self.status()):
            assert self._following.poll() is None, self.died_of()
            assert time.monotonic() < deadline, (
                f"not within {WITHIN_S} s: {what}\n{self.followed()}"
            )
            time.sleep(0.2)

    def trains(self) -> None:
        """Waits for: a step after this moment."""
        step = self.status().step
        self.wait(lambda s: s.step > step, f"a step after {step}")

    def trained(self) -> list[int]:
        """The number of the group, once a step that trained it."""
        found: list[int] = []
        for path in sorted((self.path / "samples").glob("step-*.parquet")):
            found += {int(row["group_id"][1:]) for row in read_samples(path)}
        return sorted(found)


def sizes(status: Snapshot) -> dict[str, int]:
    return {"generation": 0, "scoring": 0} | {pool.name: pool.alive for pool in status.pools}


def node_of(actor_class: str, address: str, nodes: Nodes) -> Node:
    alive = list_actors(address=address, filters=[("state", "=", "ALIVE")], limit=1000)
    [node_id] = [actor.node_id for actor in alive if actor.class_name == actor_class]
    [node] = [node for node in nodes.nodes if node.handle.node_id == node_id]
    return node
