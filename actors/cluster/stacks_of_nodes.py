"""Stacks of every process of a run on all nodes; see `rlhf_cluster.observe.record.stacks`.

Raises nothing: a host that cannot be asked has a line that says so.

Waits for: the processes of this host, at most `WITHIN_S`; then one task on each other node that has
processes of the run, at most `NODE_TIMEOUT_S`.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rlhf_cluster.observe.record import stacks
from rlhf_cluster.util.slow_disk import run_in_thread

log = logging.getLogger(__name__)

WITHIN_S = 2.0
NODE_TIMEOUT_S = 10.0


async def of_every_process(log_dir: Path) -> dict[str, list[str]]:
    """Return the lines of every process's stacks by the name of its log, without blocking the loop."""
    return await run_in_thread(_gather, log_dir)


def nodes_of(hosts: set[str], nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Return the id of one live Ray node per host, for those of `hosts` that have one."""
    return {
        node["NodeManagerHostname"]: node["NodeID"]
        for node in nodes
        if node["Alive"] and node["NodeManagerHostname"] in hosts
    }


def ask_on(nodes: dict[str, str], log_dir: Path) -> dict[str, list[str]]:
    """Collect the stacks on other hosts, with a task on the node of each."""
    ask = ray.remote(num_cpus=0, max_retries=0)(stacks.ask)
    tasks = {
        host: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        ).remote(str(log_dir), WITHIN_S)
        for host, node in nodes.items()
    }
    _, late = ray.wait(list(tasks.values()), num_returns=len(tasks), timeout=NODE_TIMEOUT_S)
    found: dict[str, list[str]] = {}
    for host, task in tasks.items():
        if task in late:
            found[host] = [f"no process of this host was asked within {NODE_TIMEOUT_S:g} s"]
            continue
        try:
            found |= ray.get(task)
        except RayError as error:  # the host that died may be the one that matters
            found[host] = [f"this host could not be asked: {error}"]
    return found


def _gather(log_dir: Path) -> dict[str, list[str]]:
    try:
        elsewhere = stacks.hosts(log_dir) - {socket.gethostname()}
        found = stacks.ask(log_dir, WITHIN_S)
        if elsewhere:
            found |= ask_on(nodes_of(elsewhere, ray.nodes()), log_dir)
    except (OSError, RayError, ConnectionError) as error:
        log.warning("stacks of the run's processes: %s", error)
        return {}
    return found
