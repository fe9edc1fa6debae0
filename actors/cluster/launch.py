"""Start and end of actors: preflight, one placement group per replica, environment, removal.

Nothing starts before `preflight` has found resources for every bundle, unless the run may wait for new
nodes. Every actor runs with the same small environment, to which each kind adds its own variables.
Names contain a token of this attempt, so a second attempt never meets an actor that a first one left.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.cluster.calls import answer
from rlhf_cluster.errors import PlacementError, WorkerSilent
from rlhf_cluster.planning.placement import Bundle, check_fits
from rlhf_cluster.util.provenance import DIGEST_VARIABLE, check_same_code, code_digest

log = logging.getLogger(__name__)

OWN_CODE = code_digest()
"""Digest of this process's code. Computed at import, so that no event loop waits for it."""

BASE_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "RAY_USAGE_STATS_ENABLED": "0",
}
CPU_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class RayPlaces:
    """Ray's reservation of resources and killing of actors. Tests replace it by a fake."""

    def reserve(
        self, resources: list[dict[str, float]], name: str, avoid: Collection[str] = ()
    ) -> PlacementGroup:
        """Reserve `resources`, one entry per bundle, on nodes whose ids are not in `avoid`."""
        if not avoid:
            return placement_group(resources, strategy="PACK", name=name)
        elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(avoid))})"}
        return placement_group(
            resources,
            strategy="PACK",
            name=name,
            bundle_label_selector=[elsewhere for _ in resources],
        )

    def node_of(self, group: PlacementGroup) -> str:
        """Return the id of the node that has the first bundle; "" if it is not known."""
        try:
            return placement_group_table(group).get("bundles_to_node_id", {}).get(0) or ""
        except RayError as error:
            log.info("the node of a placement group is not known: %s", error)
            return ""

    def fitting(self, resources: Mapping[str, float]) -> list[str]:
        """Return the ids of the live nodes that are large enough, whether or not they are in use."""
        return [
            node["NodeID"]
            for node in ray.nodes()
            if node["Alive"]
            and all(node["Resources"].get(name, 0.0) >= n for name, n in resources.items())
        ]

    def give_back(self, group: PlacementGroup) -> None:
        """Remove a placement group; does nothing if it no longer exists."""
        remove_placement_group(group)

    def kill(self, actor: Any) -> None:
        """Kill an actor; does nothing if it is dead already."""
        ray.kill(actor, no_restart=True)

    def free(self) -> dict[str, float]:
        """Return the CPUs and GPUs that nothing in the cluster has reserved."""
        return {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}


RAY_PLACES = RayPlaces()


def resources_by_node() -> dict[str, dict[str, float]]:
    """Return the resources of every live node by address, including those that other jobs hold."""
    return {
        f"{node['NodeManagerAddress']}/{node['NodeID'][:6]}": dict(node["Resources"])
        for node in ray.nodes()
        if node["Alive"]
    }


def preflight(bundles: Sequence[Bundle], node_timeout_s: float = 0.0) -> None:
    """Raise `PlacementError` if the run cannot fit the cluster, before anything starts.

    A run with `node_timeout_s` is not checked. It may wait for nodes that do not exist yet, for which
    its placement groups ask the autoscaler.
    """
    if node_timeout_s == 0:
        check_fits(bundles, resources_by_node())


async def place(
    bundles: Sequence[Bundle],
    name: str,
    timeout_s: float,
    places: RayPlaces = RAY_PLACES,
    avoid: Mapping[str, BaseException] | None = None,
) -> PlacementGroup:
    """Reserve `bundles` in one placement group.

    Args:
        avoid: nodes that must not be used, with the reason of each.
    Raises: `PlacementError` after `timeout_s`.
    Waits for: free resources.
    """
    avoid = avoid or {}
    group = places.reserve([b.resources for b in bundles], name, avoid)
    try:
        await answer(group.ready(), timeout_s, f"placement of {name}")
    except BaseException as error:
        places.give_back(group)
        if not isinstance(error, WorkerSilent):
            raise
        avoided = "".join(f" Node {node} is avoided: {why}." for node, why in avoid.items())
        raise PlacementError(
            f"no resources for {', '.join(str(b) for b in bundles)} within {timeout_s:g} s, the larger "
            f"of cluster.placement_timeout_s and cluster.node_timeout_s.{avoided} Free in the cluster "
            f"now: {places.free() or 'nothing'}. Free some, or lower what the run asks for"
        ) from error
    return group


def spawn(
    cls: type,
    arguments: Sequence[Any],
    *,
    bundle: Bundle,
    group: PlacementGroup,
    index: int,
    environment: Mapping[str, str],
    options: Mapping[str, Any],
) -> Any:
    """Start an actor of the plain class `cls` in bundle `index` of `group`, and return its handle."""
    on_gpu = bundle.gpus > 0
    variables = BASE_ENVIRONMENT | ({} if on_gpu else CPU_ENVIRONMENT) | dict(environment)
    paths = [
        os.environ.get("PYTHONPATH", ""),
        os.getcwd(),
    ]  # where users' rewards are imported from
    variables[DIGEST_VARIABLE] = OWN_CODE
    variables.setdefault("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    strategy = PlacementGroupSchedulingStrategy(
        placement_group=group, placement_group_bundle_index=index
    )
    remote = ray.remote(
        num_cpus=bundle.cpus,
        num_gpus=bundle.gpus,
        scheduling_strategy=strategy,
        runtime_env={"env_vars": variables},
        **options,
    )
    return remote(cls).remote(*arguments)


def check_code() -> None:
    """Refuse to work for a driver with other code: `RunError`. Every actor calls it as it starts."""
    check_same_code(os.environ, f"node {ray.util.get_node_ip_address()}")


def take_down(actor: Any, group: PlacementGroup | None, places: RayPlaces = RAY_PLACES) -> None:
    """Kill `actor` and remove its placement group, even if the kill fails."""
    try:
        places.kill(actor)
    finally:
        if group is not None:
            places.give_back(group)
