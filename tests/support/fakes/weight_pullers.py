"""Actors that take versions of weights, or do not, and pools of them; none of it is Ray's."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ray.exceptions import RayTaskError

from actors.cluster.calls import answer
from actors.services.generation_client import RayGeneration
from actors.services.scoring_client import RayScoring
from rlhf_cluster.errors import WeightError, WorkerError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.run.pool_version import PoolVersion
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.small_weights import (
    publish,
    small_model,
)
from tests.support.fakes.services import make_version

PULL_S = 0.2
LOAD_S = 2.0  # a small reference is written within it, too
SLOW = WeightError("reading version 1: 3 of 9 tensors were not there within 96 s")


class Reference:
    """What a call returns: an answer, an error that the worker raised, or neither for ever."""

    def __init__(self, found: Any = None, never: bool = False) -> None:
        self._future: Future[Any] = Future()
        if isinstance(found, Exception):
            self._future.set_exception(RayTaskError("method", "its stack", found))
        elif not never:
            self._future.set_result(found)

    def future(self) -> Future[Any]:
        return self._future


class Puller:
    """An actor: the n-th of its pulls gives `answers[n]`, the last one again and again."""

    def __init__(self, *answers: Exception | str) -> None:
        self.answers: list[Exception | str] = list(answers)
        self.healthy, self.pulled = True, list[int]()
        self.versions: list[int] = []  # those that it took
        self.pull = self.load_reference = self.health = self
        self.never: list[Reference] = []

    def remote(self, version: WeightVersion | None = None) -> Reference:
        if version is None:  # health
            return Reference(None if self.healthy else WorkerError("its weights are lost"))
        self.pulled.append(version.version)
        found = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if found == "never":
            return Reference(never=True)
        if isinstance(found, Exception):
            return Reference(found)
        self.versions.append(version.version)
        return Reference(version)


class Pulling:
    """`RayGeneration` over `pullers`; replacements take whatever they are asked to."""

    kind = "generation"

    def __init__(self, *pullers: Puller, **limits: Any) -> None:
        self.pullers, self.ended = list(pullers), list[str]()
        self.slept, self.refuses_until_s = list[float](), float("inf")
        self.pool = WorkerPool(
            kind=self.kind,
            launch=self._launch,
            retire=lambda worker: self.ended.append(worker.name),
            check=self._check,
            sleep=self._sleep,
            limits=PoolLimits(acquire_timeout_s=5.0, backoff_s=0.0, **limits),
        )
        self.client = self._client()

    def _client(self) -> Any:
        section = tiny_config(generation={"pull_timeout_s": PULL_S}).generation
        return RayGeneration(self.pool, section, section.take_deadline_s)

    async def _launch(self, name: str) -> Worker:
        number = int(name.rpartition("-")[2])
        actor = self.pullers[number] if number < len(self.pullers) else Puller("fine")
        worker = Worker(name=name, actor=actor, placement=None)
        await self._join(worker)
        return worker

    async def _join(self, worker: Worker) -> None:
        await self.client.join(worker)

    async def _sleep(self, seconds: float) -> None:
        """No time passes; after `refuses_until_s` of it every puller takes what it is asked to."""
        self.slept.append(seconds)
        if sum(self.slept) >= self.refuses_until_s:
            for puller in self.pullers:
                puller.answers = ["fine"]
        await asyncio.sleep(0)

    async def _check(self, worker: Worker) -> None:
        await answer(worker.actor.health.remote(), 1.0, f"{worker.name}.health")

    async def start(self) -> None:
        await self.pool.start(len(self.pullers))

    @property
    def brought(self) -> PoolVersion:
        return self.client._version

    async def bring(self, version: int) -> None:
        """The version goes live."""
        await self.client.pull(make_version(version))

    def states(self) -> list[str]:
        return [worker.state.value for worker in self.pool.workers]

    async def settle(self) -> None:
        for _ in range(100):
            await asyncio.sleep(0)


class Moving(Pulling):
    """`RayScoring` over `pullers`, whose reference is every version that goes live; policy versions
    are written into `folder` as they are brought."""

    kind = "scoring"

    def __init__(self, folder: Path, *pullers: Puller, **limits: Any) -> None:
        self.folder = folder
        super().__init__(*pullers, **limits)

    def _client(self) -> Any:
        moves = {"type": "periodic", "every": 1}
        config = tiny_config(
            run={"root": str(self.folder), "start_timeout_s": LOAD_S},
            scoring={"reference": True, "reference_update": moves},
        )
        self.weights = config.weights_dir
        return RayScoring({"scoring": self.pool}, config)

    async def _join(self, worker: Worker) -> None:
        await self.client.join("scoring", worker)

    @property
    def brought(self) -> PoolVersion:
        return self.client._reference

    async def bring(self, version: int) -> None:
        policy = small_model(seed=version)
        await self.client.follow(publish(self.weights, version, policy))
