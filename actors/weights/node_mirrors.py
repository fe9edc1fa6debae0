"""Weight relay of a run: mirrors of generation workers, shards lent by learner ranks, and a planner.

The planner is an actor. It decides which node fetches which piece from which other process.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.cluster.calls import (
    NamedActor,
    serving,
)
from rlhf_cluster.config import RunConfig
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.weights.transports.lent_shards import ShardLender
from rlhf_cluster.weights.transports.mirror_carrier import ThreadCarrier
from rlhf_cluster.weights.transports.mirror_folder import (
    NodeCopies,
    copies_of,
    sweep,
)
from rlhf_cluster.weights.transports.node_mirror import (
    PARALLEL,
    Mirror,
)
from rlhf_cluster.weights.transports.rank_memory import ShardServer
from rlhf_cluster.weights.transports.relay_plan import (
    Assignment,
    Piece,
    RelayPlan,
)

log = logging.getLogger(__name__)

_CALL_TIMEOUT_S = 10.0
_GONE_TIMEOUT_S = 15.0
_CLEAR_TIMEOUT_S = 20.0


class RelayActor:
    """Actor that is `mirror_ports.Planner` for all nodes, one call at a time."""

    def __init__(self, streams: int) -> None:
        self._plan = RelayPlan(streams=streams, uploads=PARALLEL)

    def exchange(
        self,
        node: str,
        wanted: Sequence[Piece],
        done: Sequence[tuple[Piece, Any]],
        failed: Sequence[tuple[Piece, str | None]],
    ) -> Assignment | None:
        return self._plan.exchange(node, wanted, done, failed)

    def keeps(self, node: str, versions: Sequence[int]) -> None:
        self._plan.keeps(node, versions)

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]]) -> None:
        self._plan.lends(node, pieces)

    def begin_anew(self) -> None:
        self._plan.begin_anew()


class RemotePlanner(NamedActor):
    """Handle of the run's `mirror_ports.Planner` in a worker's process."""

    def __init__(self, run_name: str) -> None:
        super().__init__(_name(run_name), "which plans who fetches which weights from whom")

    def exchange(
        self,
        node: str,
        wanted: Sequence[Piece],
        done: Sequence[tuple[Piece, Any]],
        failed: Sequence[tuple[Piece, str | None]],
    ) -> Assignment | None:
        arguments = (node, list(wanted), list(done), list(failed))
        return self.call(_CALL_TIMEOUT_S, "exchange", *arguments)

    def keeps(self, node: str, versions: Sequence[int]) -> None:
        self.call(_CALL_TIMEOUT_S, "keeps", node, list(versions))

    def lends(self, node: str, pieces: Sequence[tuple[Piece, Any]], timeout_s: float) -> None:
        self.call(min(_CALL_TIMEOUT_S, timeout_s), "lends", node, list(pieces))

    def begin_anew(self) -> None:
        self.call(_CALL_TIMEOUT_S, "begin_anew")


def mirror_of(config: RunConfig, worker: str) -> Mirror | None:
    """Build the mirror of this process; None if the run has no relay."""
    if not config.weights.is_relayed:
        return None
    name, server = _server(worker, config.generation.pull_timeout_s)
    return Mirror(
        name,
        RemotePlanner(config.run.name),
        NodeCopies(config.weights_dir, config.weights.mirror_folder),
        ThreadCarrier(config.weights_dir, name, server),
    )


def lender_of(config: RunConfig) -> ShardLender | None:
    """Build the lender of this learner rank's shards; None if the run has no relay."""
    if not config.weights.is_relayed:
        return None
    name, server = _server("learner", config.generation.pull_timeout_s)
    return ShardLender(name, RemotePlanner(config.run.name), server)


def _server(role: str, timeout_s: float) -> tuple[str, ShardServer]:
    """Return the name of this process among all that serve files, and its server."""
    host = ray.util.get_node_ip_address()
    name = f"{role} ({host}, process {os.getpid()})"
    return name, ShardServer(name, host, timeout_s)


@asynccontextmanager
async def serving_relay(config: RunConfig) -> AsyncIterator[None]:
    """Run the planner inside the block, and remove the run's mirrors from all nodes after it.

    The files of a node that does not answer are removed by the next run there.

    Waits for: the planner's name, like `serving`; at the end for every node to remove its files, at
    most `_CLEAR_TIMEOUT_S`.
    """
    streams = config.weights.mirror_streams

    class Relay(RelayActor):
        def __init__(self) -> None:
            super().__init__(streams)

    try:
        async with serving(Relay, _name(config.run.name)):
            yield
    finally:
        local = copies_of(config.weights_dir, config.weights.mirror_folder)
        await run_in_thread(_clear_nodes, local)


def _clear_nodes(
    local: Path, list_nodes: Callable[[], Sequence[dict[str, Any]]] = ray.nodes
) -> None:
    clear = ray.remote(num_cpus=0, max_retries=0)(_clear)
    try:
        tasks = [
            clear.options(
                scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            ).remote(local)
            for node in list_nodes()
            if node["Alive"]
        ]
        if not tasks:  # which `ray.wait` refuses
            return
        _, late = ray.wait(tasks, num_returns=len(tasks), timeout=_CLEAR_TIMEOUT_S)
    except RayError as error:  # the run has ended, so this must not fail it
        log.warning("the copies in %s are left to the next run there (%s)", local, error)
        return
    if late:
        log.warning("%d nodes did not say that %s is removed there", len(late), local)


def _clear(local: Path) -> None:
    """Remove the run's files on this node as soon as the killed workers have ended.

    Waits for: those workers, at most `_GONE_TIMEOUT_S`.
    """
    ends = time.monotonic() + _GONE_TIMEOUT_S
    while local.exists() and time.monotonic() < ends:
        sweep(local.parent)
        time.sleep(0.1)


def _name(run_name: str) -> str:
    return f"relay:{run_name}"
