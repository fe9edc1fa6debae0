"""Check of `validate --deep` that a run's bundles fit its cluster. The check places nothing."""

from __future__ import annotations

from dataclasses import replace

from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.planning import doctor
from rlhf_cluster.planning.cluster_room import (
    address_of,
    judge_placement,
    local_cpus,
)
from rlhf_cluster.planning.doctor import Finding
from rlhf_cluster.planning.placement import demand


def placement(config: AnyConfig) -> Finding:
    """Judge whether the run fits the configured cluster, or this machine alone without one.

    The run may be meant for another cluster than this machine, so a bad verdict here is only a note.
    Raises `PlacementError`, `ConfigError` like a run that joins the cluster.
    """
    if address_of(config) is not None:
        return _on_the_cluster(config)
    here = {"CPU": float(local_cpus(config)), "GPU": float(len(doctor.gpus()))}
    found = judge_placement(demand(config), {"this machine": here}, here, 0.0)
    cure = "A run started here is refused. Meant for a cluster: set cluster.address"
    return found if found.verdict == "ok" else replace(found, verdict="note", cure=cure)


def _on_the_cluster(config: AnyConfig) -> Finding:
    from actors.cluster.ray_cluster import connected

    # isort: split
    import ray

    from actors.cluster.launch import resources_by_node

    with connected(config):
        nodes, free = resources_by_node(), ray.available_resources()
    return judge_placement(demand(config), nodes, free, config.cluster.node_timeout_s)
