"""Start of a run's pools: which class runs where, with which options.

Learner and buffer are started by `actors.services.learner_core`.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.cluster.calls import answer
from actors.cluster.launch import RAY_PLACES, RayPlaces, place, preflight, spawn, take_down
from actors.services.generation_client import RayGeneration, check_health
from actors.services.scoring_client import RayScoring, score_deadline_s
from actors.services.worker_actors import HEALTH_GROUP, GenerationActor, ScoringActor
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.pools import GENERATION, pool_sections
from rlhf_cluster.errors import PlacementError, RlhfError
from rlhf_cluster.generation.generation_worker import DEFAULT_ENGINE
from rlhf_cluster.planning.placement import Bundle, pool_bundle
from rlhf_cluster.run.restarts import FailedStarts, RestartWindow
from rlhf_cluster.run.worker_pool import PoolLimits, Worker, WorkerPool
from rlhf_cluster.util.waiting import gather_or_cancel, reply_deadline

log = logging.getLogger(__name__)

GENERATION_CALLS = 900
"""Most groups that one engine has at once; further ones wait in the pool."""
SCORING_CALLS = 8
CONTROL_CALLS, SCORING_SPARE_THREADS = 100, 2
"""Concurrent calls of an actor in addition to its calls for groups.

Health checks, pulls, a new reference and cancelled calls therefore never wait for a group to end.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launcher:
    """Start of actors for one attempt: holds the run, its model folder, and the attempt's token."""

    config: RunConfig
    model_dir: str
    engine_factory: str
    engine_environment: dict[str, str]
    attempt: str = ""
    places: RayPlaces = RAY_PLACES
    spawn: Callable[..., Any] = spawn
    failed_starts: FailedStarts = field(default_factory=FailedStarts)
    last_resorts: dict[int, tuple[Any, PlacementError]] = field(default_factory=dict)
    """Placement groups on avoided nodes by their `id`, each with the reason for that node."""

    def placement_name(self, owner: str) -> str:
        return f"rlhf-{self.config.run.name}-{owner}-{self.attempt or uuid.uuid4().hex[:8]}"

    async def actor(
        self, cls: type, arguments: list[Any], bundle: Bundle, **options: Any
    ) -> tuple[Any, Any]:
        """Start an actor in a separate placement group, and return both.

        An avoided node is used only if no other node has the resources in time, as it may work again.
        If the start fails, the placement group is removed.
        """
        environment = options.pop("environment", {})
        timeout_s = self.config.cluster.room_timeout_s
        name = self.placement_name(bundle.owner)
        avoid = self.failed_starts.avoided(lambda: self.places.fitting(bundle.resources))
        no_room = None
        try:
            group = await place([bundle], name, timeout_s, self.places, avoid)
        except PlacementError as error:
            if not avoid:
                raise
            no_room = error
            group = await place([bundle], name, timeout_s, self.places)
        try:
            actor = self.spawn(
                cls,
                arguments,
                bundle=bundle,
                group=group,
                index=0,
                environment=environment,
                options=options,
            )
        except BaseException:
            self.places.give_back(group)
            raise
        if no_room is not None:
            self.last_resorts[id(group)] = group, no_room
        return actor, group

    async def ready(self, worker: Worker, join: Callable[[Worker], Awaitable[None]]) -> Worker:
        """Start `worker`, let it join, and return it.

        If either fails, the worker is taken down, and the failure is counted for its node. A failed
        start on an avoided node raises `PlacementError`, which uses no restart of a pool that has its
        quorum.
        """
        node = self.places.node_of(worker.placement)
        _, no_room = self.last_resorts.pop(id(worker.placement), (None, None))
        try:
            timeout_s = self.config.run.start_timeout_s
            await answer(worker.actor.start.remote(), timeout_s, f"{worker.name}.start")
            await join(worker)
        except BaseException as error:
            if isinstance(error, RlhfError) and node and self.failed_starts.failed(node, error):
                log.warning("node %s is avoided: %s", node, error)
            try:
                take_down(worker.actor, worker.placement, self.places)
            except Exception:  # the first failure, raised below, says more
                log.exception("%s: not ended", worker.name)
            if no_room is not None and isinstance(error, RlhfError):
                raise PlacementError(f"{no_room}. A start there failed again: {error}") from error
            raise
        self.failed_starts.succeeded(node)
        return worker


def generation_pool(launcher: Launcher) -> tuple[WorkerPool, RayGeneration]:
    """Build an empty generation pool and its client. Workers join with the newest weights."""
    config = launcher.config

    async def launch(name: str) -> Worker:
        bundle = pool_bundle(config, "generation", int(name.rsplit("-", 1)[1]))
        actor, group = await launcher.actor(
            GenerationActor,
            [config, launcher.model_dir, name, launcher.engine_factory],
            bundle,
            environment=launcher.engine_environment,
            max_concurrency=GENERATION_CALLS + CONTROL_CALLS,
        )
        worker = Worker(name=name, actor=actor, placement=group)
        return await launcher.ready(worker, client.join)

    drain_s = reply_deadline(reply_deadline(config.generation.request_timeout_s))
    pool = _pool("generation", launch, drain_s, config, GENERATION_CALLS)
    client = RayGeneration(pool, config.generation, config.pull_deadline_s)
    return pool, client


def scoring_pools(launcher: Launcher) -> tuple[list[WorkerPool], RayScoring]:
    """Build the empty pools of all scoring sections, and their client."""
    config = launcher.config

    async def launch(kind: str, name: str) -> Worker:
        bundle = pool_bundle(config, kind, int(name.rsplit("-", 1)[1]))
        actor, group = await launcher.actor(
            ScoringActor,
            [config, launcher.model_dir, name, kind],
            bundle,
            max_concurrency=SCORING_CALLS + SCORING_SPARE_THREADS,
            concurrency_groups={HEALTH_GROUP: 1},
        )
        join = functools.partial(client.join, kind)
        return await launcher.ready(Worker(name=name, actor=actor, placement=group), join)

    drain_s = reply_deadline(reply_deadline(score_deadline_s(config.scoring, config.buffer)))
    pools = {
        kind: _pool(kind, functools.partial(launch, kind), drain_s, config, SCORING_CALLS)
        for kind in pool_sections(config)
        if kind != GENERATION
    }
    client = RayScoring(pools, config)
    return list(pools.values()), client


@asynccontextmanager
async def started_pools(
    config: RunConfig, pools: Sequence[WorkerPool]
) -> AsyncIterator[asyncio.Future[None]]:
    """Start all pools inside the block, and close them after it.

    Yields a future that is done when each pool has its quorum. Further workers start in the background.
    """
    sections = pool_sections(config)

    async def start() -> None:
        await gather_or_cancel(pool.start(sections[pool.kind].workers) for pool in pools)

    started = asyncio.ensure_future(start())
    try:
        yield started
    finally:
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        for pool in pools:
            pool.close()


def environment_of_engine(config: RunConfig, engine_factory: str) -> dict[str, str]:
    """Return the environment variables of every process with an engine."""
    if engine_factory != DEFAULT_ENGINE:
        return {}
    from actors.vllm.vllm_arguments import engine_environment

    return engine_environment(config.generation.num_gpus > 0)


def _pool(
    kind: str,
    launch: Callable[[str], Any],
    drain_timeout_s: float,
    config: RunConfig,
    max_in_flight: int | None = None,
) -> WorkerPool:
    section = config.cluster
    limits = PoolLimits(
        heartbeat_s=section.heartbeat_s,
        heartbeat_timeout_s=section.heartbeat_timeout_s,
        acquire_timeout_s=config.run.stall_timeout_s,
        drain_timeout_s=drain_timeout_s,
        max_restarts=section.max_restarts,
        min_workers=pool_sections(config)[kind].min_workers,
        max_in_flight=max_in_flight,
    )
    return WorkerPool(
        kind=kind,
        launch=launch,
        retire=lambda worker: take_down(worker.actor, worker.placement),
        check=functools.partial(check_health, timeout_s=limits.heartbeat_timeout_s),
        limits=limits,
        restarts=RestartWindow(section.restart_window_s),
        preflight=lambda wanted: preflight(
            [pool_bundle(config, kind, i) for i in range(wanted)], section.node_timeout_s
        ),
    )
