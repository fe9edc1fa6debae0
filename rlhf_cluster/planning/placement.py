"""Bundles that a run needs, whether a cluster can hold them, and the settings in numbers.

A bundle is what one replica (or one learner rank) needs on a single node. Fitting is first-fit
decreasing over complete nodes: a bundle never spans two. Pure; node sizes are arguments.

With `cluster.worker_groups` each bundle also asks for a small amount of its group's resource,
which only the nodes of that group offer. So a service is placed on nodes of its kind, and an
autoscaler that sees the bundle pending knows which kind to start.

`judge_placement` says what a user can do where bundles do not fit. `derived` lists the numbers that a
configuration results in, for the user to check before a start.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.config.pools import GENERATION, SCORING, pool_sections
from rlhf_cluster.errors import PlacementError
from rlhf_cluster.planning.doctor import Finding

BUFFER_CPUS = 0.1

WORKER_GROUPS = ("generation", "scoring", "training")

GROUP_SHARE = 0.001
"""Share of its group's resource that a bundle asks for. A node has 1, so any number of bundles fits."""


def group_resource(group: str) -> str:
    """Name of the resource that the nodes of a worker group offer."""
    return f"rlhf_{group}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The needs of one replica on one node."""

    owner: str  # such as "generation-0"
    cpus: float
    gpus: float
    group: str | None = None  # one of `WORKER_GROUPS`; None: any node

    @property
    def resources(self) -> dict[str, float]:
        own = {} if self.group is None else {group_resource(self.group): GROUP_SHARE}
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {}) | own

    def __str__(self) -> str:
        return f"{self.owner} ({_amounts(self.resources)})"


def demand(config: AnyConfig) -> list[Bundle]:
    """Return all bundles of a run at its starting size.

    An offline stage has the bundles of its ranks, and a stage that makes a data set those of its pools.
    """
    if isinstance(config, StageConfig):
        return rank_bundles(config)
    pools = [
        pool_bundle(config, pool, i)
        for pool, section in pool_sections(config).items()
        for i in range(section.workers)
    ]
    if isinstance(config, GenerateConfig):
        return pools
    spares = [spare_bundle(config, i) for i in range(config.learner.spares)]
    return [*pools, *rank_bundles(config), *spares, buffer_bundle(config)]


def pool_bundle(config: RunConfig | GenerateConfig, pool: str, index: int) -> Bundle:
    """Return the bundle of one worker. Pools of `[scoring.pools]` are on the nodes of scoring."""
    section = pool_sections(config)[pool]
    group = GENERATION if pool == GENERATION else SCORING
    return Bundle(
        owner=f"{pool}-{index}",
        cpus=section.num_cpus,
        gpus=section.num_gpus,
        group=group if config.cluster.worker_groups else None,
    )


def buffer_bundle(config: RunConfig) -> Bundle:
    return Bundle(owner="buffer", cpus=BUFFER_CPUS, gpus=0.0, group=_training(config))


def rank_bundles(config: RunConfig | StageConfig) -> list[Bundle]:
    """Return the bundles of all learner ranks."""
    section = config.learner
    return [
        Bundle(
            owner=f"learner-{i}",
            cpus=section.num_cpus,
            gpus=section.num_gpus,
            group=_training(config),
        )
        for i in range(section.ranks)
    ]


def spare_bundle(config: RunConfig | StageConfig, number: int) -> Bundle:
    """Return the bundle of a hot spare of the learner, which needs what any rank needs."""
    return replace(rank_bundles(config)[0], owner=f"spare-{number}")


def _training(config: RunConfig | StageConfig) -> str | None:
    return "training" if config.cluster.worker_groups else None


def fewer_ranks(bundles: Sequence[Bundle], least: int, free: Mapping[str, float]) -> range:
    """Return the numbers of ranks to try when the cluster cannot place all `bundles`, largest first.

    The bundles are alike. The first number is what `free`, the free resources of the whole cluster,
    would hold on one node; the last is `least`.
    """
    needs = {kind: amount for kind, amount in bundles[0].resources.items() if amount}
    most = min((int(free.get(k, 0.0) / v + 1e-9) for k, v in needs.items()), default=len(bundles))
    return range(min(most, len(bundles) - 1), least - 1, -1)


def check_fits(bundles: Sequence[Bundle], nodes: Mapping[str, Mapping[str, float]]) -> None:
    """Raise `PlacementError` naming demand, supply and the first bundle that finds no place.

    `nodes`: free resources by node name.
    """
    if left := unplaced(bundles, nodes):
        raise PlacementError(
            f"the run does not fit the cluster: no node can hold {left[0]}. Demand: "
            f"{_total([b.resources for b in bundles])} in {len(bundles)} bundles. Supply: "
            f"{supply(nodes)}. Lower the workers, ranks or their num_cpus / num_gpus, or add nodes"
        )


def unplaced(bundles: Sequence[Bundle], nodes: Mapping[str, Mapping[str, float]]) -> list[Bundle]:
    """Return the bundles that do not fit on `nodes` after the larger ones are placed, largest first."""
    free = {name: dict(resources) for name, resources in nodes.items()}
    left = []
    for bundle in sorted(bundles, key=lambda b: (b.gpus, b.cpus), reverse=True):
        wanted = bundle.resources.items()
        for node in free.values():
            if all(node.get(kind, 0.0) + 1e-9 >= amount for kind, amount in wanted):
                for kind, amount in wanted:
                    node[kind] -= amount
                break
        else:
            left.append(bundle)
    return left


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(resources.items()))


def _total(resources: Sequence[Mapping[str, float]]) -> str:
    kinds = sorted({kind for r in resources for kind in r})
    return _amounts({kind: sum(r.get(kind, 0.0) for r in resources) for kind in kinds})


def supply(nodes: Mapping[str, Mapping[str, float]]) -> str:
    if not nodes:
        return "no live node"
    parts = [
        f"{name}: {_amounts({k: v for k, v in r.items() if v and _counts(k)}) or 'nothing'}"
        for name, r in nodes.items()
    ]
    return "; ".join(parts)


def _counts(kind: str) -> bool:
    """Whether a bundle can ask for this resource, among all that Ray lists for a node."""
    return kind in ("CPU", "GPU", *map(group_resource, WORKER_GROUPS))


def _held_out(config: RunConfig) -> str:
    sizes = [each.num_prompts for each in config.evaluation.all_sets]
    if None in sizes:  # known once the files are read
        return f"all of their files, {len(sizes)} sets"
    return f"{sum(size or 0 for size in sizes):,}"


def derived(config: RunConfig) -> dict[str, str]:
    """Return the numbers that the settings result in, as name and text."""
    run, group_size = config.run, config.algorithm.group_size
    updates = config.learner.epochs * config.learner.minibatches
    samples = run.groups_per_step * group_size
    longest = config.generation.max_response_tokens
    fresh = config.fresh_groups
    replayed = run.groups_per_step - fresh
    again = f", {replayed:,} of them replayed" if replayed else ""
    return {
        "steps": f"{run.steps:,}, with {updates:,} optimizer steps each",
        "prompts": f"{run.steps * fresh:,} ({fresh:,} a step)",
        "samples a step": f"{samples:,} ({run.groups_per_step:,} prompts x {group_size:,}{again})",
        "response tokens a step": f"at most {samples * longest:,}",
        "longest sequence": f"{config.max_sequence_tokens:,} tokens",
        "max staleness": f"{config.staleness.bound} steps",
        "warm-up": f"{config.sft.steps:,} steps of {config.sft.batch_size:,} examples"
        if config.sft.steps
        else "none",
        "held-out prompts": _held_out(config),
        **{
            f"{pool} demand": total_resources(
                [b for b in demand(config) if b.owner.rsplit("-", 1)[0] == pool]
            )
            for pool in (*pool_sections(config), "learner")
        },
        "total demand": total_resources(demand(config)),
        "run directory": str(config.run_dir),
    }


def total_resources(bundles: Sequence[Bundle]) -> str:
    """Return the sum of all bundles' needs as text, such as "4.1 CPU, 2 GPU"."""
    kinds = sorted({kind for bundle in bundles for kind in bundle.resources})
    sums = {kind: sum(b.resources.get(kind, 0.0) for b in bundles) for kind in kinds}
    return ", ".join(f"{amount:g} {kind}" for kind, amount in sums.items()) or "nothing"


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
