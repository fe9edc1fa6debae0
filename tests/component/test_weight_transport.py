"""Weights by the relay: real learner and generation actors, without models."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from actors.services.generation_client import (
    RayGeneration,
    check_health,
)
from actors.services.rank_actors import ACTOR_OPTIONS, RayLearner
from actors.services.worker_actors import GenerationActor
from actors.weights.transports import Transport
from rlhf_cluster.config import RunConfig
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from rlhf_cluster.weights import store
from rlhf_cluster.weights.sync import WeightSync
from rlhf_cluster.weights.transports.mirror_folder import copies_of
from tests.support.builders.run_configs import tiny_config
from tests.support.engines.scripted_engine import (
    write_script,
    write_tokenizer,
)
from tests.support.processes.rank_actors import (
    NUM_RANKS,
    FakeRankActor,
    weights_of,
)

ENGINE = "tests.support.engines.scripted_engine:make_engine"
ENVIRONMENT = {"env_vars": {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}}
READS = {"read_weights": True}


class _Buffer:
    async def set_live_version(self, version: int) -> None: ...


@dataclass
class Cluster:
    """Two ranks and two workers of a run with the relay."""

    config: RunConfig
    model_dir: Path
    pool: WorkerPool
    generation: RayGeneration
    ranks: list[Any]

    async def learner(self, first_version: int) -> RayLearner:
        """New ranks, whose first snapshot is `first_version`."""
        self.ranks = [
            ray.remote(num_cpus=0, runtime_env=ENVIRONMENT, **ACTOR_OPTIONS)(FakeRankActor).remote(
                self.config, str(self.model_dir), rank
            )
            for rank in range(NUM_RANKS)
        ]
        learner = RayLearner(self.ranks, self.config)
        learner.writer = store.begin_attempt(self.config.weights_dir)
        await learner._all("setup", 60.0, str(first_version))
        return learner

    async def publish(self, learner: RayLearner) -> WeightVersion:
        await learner.snapshot()
        return await learner.publish()

    async def versions_live(self) -> list[int]:
        health = [await w.actor.health.remote() for w in self.pool.live]
        return [h["version"] for h in health]

    def script(self, **script: Any) -> None:
        write_script(self.model_dir, **READS, **script)


@asynccontextmanager
async def started(tmp_path: Path, name: str, **weights: Any) -> AsyncIterator[Cluster]:
    model_dir = tmp_path / "model"
    model_dir.mkdir()
    write_tokenizer(model_dir)
    write_script(model_dir, **READS)
    config = tiny_config(
        run={"name": name, "root": str(tmp_path / "runs"), "steps": 1000},
        weights={"transport": "relay", "mirror": str(tmp_path / "mirror"), **weights},
        generation={"pull_timeout_s": 20.0},
        staleness={"max_staleness": 0, "pipeline_depth": 0},
        learner={"ranks": NUM_RANKS},
    )

    async def launch(name: str) -> Worker:
        actor = (
            ray.remote(GenerationActor)
            .options(num_cpus=0, runtime_env=ENVIRONMENT, max_concurrency=100)
            .remote(config, str(model_dir), name, ENGINE)
        )
        await actor.start.remote()
        worker = Worker(name=name, actor=actor, placement=None)
        await cluster.generation.join(worker)
        return worker

    pool = WorkerPool(
        kind="generation",
        launch=launch,
        retire=lambda worker: ray.kill(worker.actor),
        check=lambda worker: check_health(worker, 30.0),
        limits=PoolLimits(backoff_s=0.01),
    )
    client = RayGeneration(pool, config.generation, config.pull_deadline_s)
    cluster = Cluster(config, model_dir, pool, client, [])
    async with Transport(config).serving():
        try:
            await pool.start(2)
            yield cluster
        finally:
            pool.close()
            for rank in cluster.ranks:
                ray.kill(rank)


async def until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    ends = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < ends, what
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("format", ["full", "delta"])
async def test_two_ranks_publish_and_two_workers_pull_and_nothing_stays(
    ray_address: str, tmp_path: Path, format: str
) -> None:
    async with started(tmp_path, f"publish-{format}", format=format) as cluster:
        learner = await cluster.learner(0)
        num_bytes = weights_of(0).nbytes
        for number in range(6):
            version = await cluster.publish(learner)
            await cluster.generation.pull(version)
            assert version.version == number
            assert await cluster.versions_live() == [number, number]
        kept = store.versions(cluster.config.weights_dir)
        assert kept == ([4, 5] if format == "full" else list(range(6)))
        found = dict(store.read(version.path))
        assert torch.equal(found["w"], weights_of(5))
        assert (version.stored_bytes < num_bytes / 10) == (format == "delta")
        assert cluster.pool.restarts.total == 0

        # The ranks lend what they wrote: the storage is asked for no file of it.
        lent = await cluster.publish(learner)
        folder = Path(lent.path)
        moved = folder.with_name("moved")
        await asyncio.to_thread(folder.rename, moved)
        await cluster.generation.pull(lent)
        assert await cluster.versions_live() == [6, 6]
        await asyncio.to_thread(moved.rename, folder)
        copies = copies_of(cluster.config.weights_dir, tmp_path / "mirror")
        assert sorted(p.name for p in copies.glob("v*"))[-1] == "v000006"
    await until(lambda: not copies.exists(), "the copies stay")


async def test_neither_dead_ranks_nor_a_refusal_cost_a_restart_and_the_learner_is_told(
    ray_address: str, tmp_path: Path
) -> None:
    async with started(tmp_path, "lost") as cluster:
        learner = await cluster.learner(0)
        await cluster.generation.pull(await cluster.publish(learner))
        for rank in cluster.ranks:
            ray.kill(rank)
        # A worker that joins when no learner lives finds the version all the same.
        assert await cluster.pool.resize(3) == "generation: 3 workers"
        assert await cluster.versions_live() == [0, 0, 0]
        await cluster.pool.resize(2)

        # New ranks, and a receiver that raises: the next publish works without a restart.
        learner = await cluster.learner(1)
        buffer: Any = _Buffer()

        async def sleep(seconds: float) -> None:
            await asyncio.sleep(min(seconds, 1.0))

        sync = WeightSync(learner, cluster.generation, buffer, 1, time.monotonic, sleep=sleep)
        cluster.script(fail_pull=True)
        await sync.after_step(1)

        async def refusals() -> list[tuple[int, str]]:
            return await cluster.ranks[1].refusals.remote()

        ends = time.monotonic() + 30
        while not (told := await refusals()):
            assert time.monotonic() < ends, "the learner was never told"
            await asyncio.sleep(0.05)
        cluster.script()
        await sync.drain(60)
        assert told[0][0] == 1
        assert "scripted failure of pull" in told[0][1]
        assert sync.stats.refused in (1, 2)
        assert sync.stats.live == 1 + sync.stats.refused
        assert await cluster.versions_live() == [sync.stats.live] * 2
        assert cluster.pool.restarts.total == 0

        # One of two refuses: that one is replaced by a worker that has the version.
        first = cluster.pool.live[0].name
        cluster.script(workers={first: {"fail_pull": True}})
        version = await cluster.publish(learner)
        await cluster.generation.pull(version)
        await until(lambda: len(cluster.pool.live) == 2, "the replacement did not join", 90)
        assert await cluster.versions_live() == [version.version] * 2
        assert first not in [w.name for w in cluster.pool.live]
