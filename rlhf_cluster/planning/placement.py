"""Which bundles a run needs, and whether a cluster can hold them.

A bundle is what one replica (or one learner rank) needs on a single node. Fitting is first-fit
decreasing over whole nodes: a bundle never spans two. Pure; node sizes are arguments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_cluster.config import RunConfig, StageConfig
from rlhf_cluster.config.either import AnyConfig
from rlhf_cluster.errors import PlacementError

BUFFER_CPUS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """The needs of one replica on one node."""

    owner: str  # such as "generation-0"
    cpus: float
    gpus: float

    @property
    def resources(self) -> dict[str, float]:
        return {"CPU": self.cpus} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        return f"{self.owner} ({_amounts(self.resources)})"


def demand(config: AnyConfig) -> list[Bundle]:
    """All bundles of a run at its starting size; of an offline stage its ranks."""
    if isinstance(config, StageConfig):
        return rank_bundles(config)
    generation, scoring = config.generation, config.scoring
    return [
        *(pool_bundle(config, "generation", i) for i in range(generation.workers)),
        *(pool_bundle(config, "scoring", i) for i in range(scoring.workers)),
        *rank_bundles(config),
        Bundle(owner="buffer", cpus=BUFFER_CPUS, gpus=0.0),
    ]


def pool_bundle(config: RunConfig, pool: str, index: int) -> Bundle:
    section = {"generation": config.generation, "scoring": config.scoring}[pool]
    return Bundle(owner=f"{pool}-{index}", cpus=section.num_cpus, gpus=section.num_gpus)


def rank_bundles(config: AnyConfig) -> list[Bundle]:
    """Of all learner ranks."""
    section = config.learner
    return [
        Bundle(owner=f"learner-{i}", cpus=section.num_cpus, gpus=section.num_gpus)
        for i in range(section.ranks)
    ]


def fewer_ranks(bundles: Sequence[Bundle], least: int, free: Mapping[str, float]) -> range:
    """The numbers of ranks to try when there is no room for all `bundles`, which are alike: as many as
    `free`, the free resources of the whole cluster, would hold on one node, down to `least`."""
    needs = {kind: amount for kind, amount in bundles[0].resources.items() if amount}
    most = min((int(free.get(k, 0.0) / v + 1e-9) for k, v in needs.items()), default=len(bundles))
    return range(min(most, len(bundles) - 1), least - 1, -1)


def check_fits(bundles: Sequence[Bundle], nodes: Mapping[str, Mapping[str, float]]) -> None:
    """Raise `PlacementError` naming demand, supply and the first bundle that finds no place.

    `nodes`: free resources by node name.
    """
    free = {name: dict(resources) for name, resources in nodes.items()}
    order = sorted(bundles, key=lambda b: (b.gpus, b.cpus), reverse=True)
    for bundle in order:
        room = next(
            (
                node
                for node in free.values()
                if all(node.get(k, 0.0) + 1e-9 >= v for k, v in bundle.resources.items())
            ),
            None,
        )
        if room is None:
            raise PlacementError(
                f"the run does not fit the cluster: no node has room for {bundle}. Demand: "
                f"{_total([b.resources for b in bundles])} in {len(bundles)} bundles. Supply: "
                f"{_supply(nodes)}. Lower the workers, ranks or their num_cpus / num_gpus, or add "
                "nodes"
            )
        for kind, amount in bundle.resources.items():
            room[kind] -= amount


def _amounts(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{amount:g} {kind}" for kind, amount in sorted(resources.items()))


def _total(resources: Sequence[Mapping[str, float]]) -> str:
    kinds = sorted({kind for r in resources for kind in r})
    return _amounts({kind: sum(r.get(kind, 0.0) for r in resources) for kind in kinds})


def _supply(nodes: Mapping[str, Mapping[str, float]]) -> str:
    if not nodes:
        return "no live node"
    parts = [
        f"{name}: {_amounts({k: r.get(k, 0.0) for k in ('CPU', 'GPU') if r.get(k)}) or 'nothing'}"
        for name, r in nodes.items()
    ]
    return "; ".join(parts)
