"""The cluster of a run, and whether the run's bundles fit on it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.planning.doctor import Finding
from rlhf_cluster.planning.placement import Bundle, supply, unplaced

Resources = Mapping[str, float]


def address_of(config: AnyConfig) -> str | None:
    """Return the address of the cluster to join, or None to start one on this machine."""
    return config.cluster.address or os.environ.get("RAY_ADDRESS") or None


def local_cpus(config: AnyConfig) -> int:
    """Return the logical CPUs of a local cluster: `cluster.num_cpus`, else the machine's cores."""
    return int(config.cluster.num_cpus or os.cpu_count() or 1)


def judge_placement(
    bundles: Sequence[Bundle],
    nodes: Mapping[str, Resources],
    free: Resources,
    node_timeout_s: float,
) -> Finding:
    """Return the finding on whether all bundles fit on the cluster.

    Args:
        nodes: resources of each live node, including those that other jobs hold.
        free: resources that no job holds, summed over all nodes.
        node_timeout_s: seconds that the run waits for further nodes; 0: it does not wait.
    """
    left = unplaced(bundles, nodes)
    if left:
        waits = node_timeout_s > 0
        return Finding(
            name="placement",
            verdict="note" if waits else "wrong",
            value=f"no room for {', '.join(str(bundle) for bundle in left)}. Nodes: {supply(nodes)}",
            cure=f"It waits cluster.node_timeout_s = {node_timeout_s:g} s for such nodes"
            if waits
            else "Lower the workers, ranks or their num_cpus / num_gpus, add nodes, or set "
            "cluster.node_timeout_s where an autoscaler starts them",
        )
    wanted: dict[str, float] = {}
    for bundle in bundles:
        for kind, amount in bundle.resources.items():
            wanted[kind] = wanted.get(kind, 0.0) + amount
    held = [
        f"{free.get(kind, 0.0):g} {kind} of {amount:g}"
        for kind, amount in sorted(wanted.items())
        if free.get(kind, 0.0) + 1e-9 < amount
    ]
    if held:
        return Finding(
            name="placement",
            verdict="note",
            value=f"other jobs leave {', '.join(held)}",
            cure="It fits once they have ended; until then it waits cluster.placement_timeout_s",
        )
    value = f"room for all; bundles: {len(bundles)}, nodes: {len(nodes)}"
    return Finding(name="placement", verdict="ok", value=value)
