"""Worker nodes of an emulated Ray cluster, all on this machine, that can be lost like real ones.

A node is a raylet, its agents, its object store and the actors placed there, with a cache folder of its
own. `lose` ends all of its processes by SIGKILL, the raylet being stopped first so that it starts no
further one, and removes its objects, also the spilled ones, and its cache. What the run keeps on the
shared disk stays: it would be on another machine.

Objects above `INLINE_BYTES` that its processes make lie in the node's own store, where Ray would send
the records of a tiny run along with the answer; so they can be lost with it.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.chaos.processes import Process, descendants, of_pid

INLINE_BYTES = 4096
GONE_WITHIN_S = 30.0
KNOWN_WITHIN_S = 180.0  # Ray looks at a node every few seconds, and gives it several looks


@dataclass(slots=True, kw_only=True)
class Node:
    handle: Any  # of Ray's emulation
    raylet: Process
    cache: Path


@dataclass(slots=True, kw_only=True)
class Nodes:
    """`wanted` nodes beside the head, on which the drivers are."""

    cluster: Any  # ray.cluster_utils.Cluster
    wanted: int
    num_cpus: int = 4
    resources: dict[str, float] = field(default_factory=dict)  # of each, of names of one's own
    own_folders: bool = False
    """Each has a folder of Ray's of its own: where nodes share one, Ray takes a job's code away from
    under its driver when it unpacks that for another node."""
    nodes: list[Node] = field(default_factory=list)

    def refill(self) -> None:
        """Start nodes until there are as many as wanted. Waits for: each to be known to Ray."""
        while len(self.nodes) < self.wanted:
            cache = Path(tempfile.mkdtemp(prefix="node-"))
            own = {
                "XDG_CACHE_HOME": str(cache),
                "RAY_max_direct_call_object_size": str(INLINE_BYTES),
            }
            before = {name: os.environ.get(name) for name in own}
            os.environ.update(own)
            try:
                folder = {"temp_dir": str(cache / "ray")} if self.own_folders else {}
                handle = self.cluster.add_node(
                    num_cpus=self.num_cpus, resources=self.resources, **folder
                )
            finally:
                for name, value in before.items():
                    os.environ.pop(name)
                    os.environ.update({} if value is None else {name: value})
            raylet = of_pid(handle.all_processes["raylet"][0].process.pid)
            assert raylet is not None, "the node ended at once"
            self.nodes.append(Node(handle=handle, raylet=raylet, cache=cache))

    def raylets(self) -> list[Process]:
        """In the order in which the nodes came."""
        return [node.raylet for node in self.nodes if node.raylet.alive()]

    def lose(self, raylet: Process) -> list[str]:
        """The node of `raylet` is gone, at once; the commands of the processes that went with it.

        Waits for: the end of each, at most `GONE_WITHIN_S`.
        """
        [node] = [node for node in self.nodes if node.raylet == raylet]
        os.kill(raylet.pid, signal.SIGSTOP)
        died = [process for pid in descendants(raylet.pid) if (process := of_pid(pid))]
        commands = sorted(process.command() for process in died)
        for process in (*died, raylet):
            if process.alive():
                os.kill(process.pid, signal.SIGKILL)
        deadline = time.monotonic() + GONE_WITHIN_S
        while any(process.alive() for process in died):
            assert time.monotonic() < deadline, (
                f"killed, and not gone in {GONE_WITHIN_S:g} s: {died}"
            )
            time.sleep(0.01)
        self._remove(node)
        return commands

    def close(self) -> None:
        """End all nodes. Waits for: Ray to know that none of them lives, those that were lost before
        too; until then it would place the actors of a next run there."""
        self.close_with_cluster()
        self.cluster.wait_for_nodes(timeout=KNOWN_WITHIN_S)

    def close_with_cluster(self) -> None:
        """End all nodes of a cluster that ends next: nobody has to know that they are gone."""
        for node in list(self.nodes):
            self._remove(node)

    def _remove(self, node: Node) -> None:
        self.nodes.remove(node)
        self.cluster.remove_node(node.handle, allow_graceful=False)
        shutil.rmtree(node.cache, ignore_errors=True)
