"""The learner ranks as actors, and the group of them as the learner port.

Each rank runs its steps one after the other in one thread; writing a snapshot to the weight store
runs in a second one ("io"), beside the next step. Every rank gets every group of a step and takes
its own part by the same plan, so no rank has to tell another what to train on.

A rank that dies or hangs fails the whole step: the error names the rank, and the others are
released by their collective deadline.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any

import ray

from actors.calls import answer
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.examples import SftExample
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.observe.samples import write_samples
from rlhf_cluster.ports import StepReport, Taken
from rlhf_cluster.records import WeightVersion

IO_GROUP = "io"
ACTOR_OPTIONS = {"concurrency_groups": {IO_GROUP: 2}}


class LearnerActor:
    """One rank. torch is imported in `setup`, so that the process is up before the model is."""

    def __init__(self, config: RunConfig, model_dir: str, rank: int) -> None:
        self._config = config
        self._model_dir = model_dir
        self._number = rank
        self._rank: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tokenizer: Any = None

    def rendezvous(self) -> str:
        """Where the ranks meet: this node, a free port. Asked of rank 0 only."""
        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def setup(self, init_method: str) -> dict[str, Any]:
        from actors.metrics import RayMetrics
        from rlhf_cluster.learning.learner import LearnerRank
        from rlhf_cluster.observe.logs import configure

        name = f"learner-{self._number}"
        configure("learner", name, self._config.run_dir / "logs")
        self._metrics = RayMetrics("learner", {"worker": name})
        ranks = self._config.learner.ranks
        self._rank = LearnerRank(self._config, self._model_dir, self._number, ranks, init_method)
        facts = self._rank.setup()
        self._shapes = self._rank.tensor_shapes()
        self._tokenizer = load_tokenizer(self._config.model.tokenizer or self._model_dir)
        return facts

    def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        return self._rank.sft_step(examples)

    def train_step(self, handles: list[list[Any]]) -> StepReport:
        groups = ray.get([handle for [handle] in handles], timeout=60)
        report = self._rank.train_step(groups)
        if self._number == 0:
            self._metrics.record(report.metrics)
            write_samples(
                self._config.run_dir / "samples",
                report.step,
                groups,
                learner_version=report.step - 1,
                decode=self._tokenizer.decode,
                limit=self._config.observe.samples_per_step,
            )
        return report

    def snapshot(self) -> int:
        return self._rank.snapshot()

    def write_snapshot(self) -> Any:
        return self._rank.write_snapshot(str(self._config.weights_dir))

    def commit(self, version: int, reports: list[Any]) -> WeightVersion:
        from rlhf_cluster.weights.store import commit

        return commit(
            str(self._config.weights_dir),
            version,
            reports,
            keep=self._config.staleness.max_staleness + 2,
            expected_names=self._shapes,
        )

    def close(self) -> None:
        if self._rank is not None:
            self._rank.close()


class RayLearner:
    """`LearnerPort` over all ranks."""

    def __init__(self, actors: Sequence[Any], config: RunConfig) -> None:
        self._actors = list(actors)
        self._config = config
        self._snapshot = -1

    async def setup(self) -> list[dict[str, Any]]:
        timeout_s = self._config.run.start_timeout_s
        where = await answer(self._actors[0].rendezvous.remote(), timeout_s, "learner-0.rendezvous")
        return await self._all("setup", timeout_s, where)

    async def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        shared = ray.put(examples)
        return (await self._all("sft_step", self._config.learner.step_timeout_s, shared))[0]

    async def train_step(self, groups: Sequence[Taken]) -> StepReport:
        handles = [taken.handle for taken in groups]
        reports = await self._all("train_step", self._config.learner.step_timeout_s, handles)
        return reports[0]

    async def snapshot(self) -> int:
        versions = await self._all("snapshot", self._config.learner.step_timeout_s)
        if len(set(versions)) != 1:
            raise WorkerError(f"learner ranks are at different versions {versions}; expected one")
        self._snapshot = versions[0]
        return self._snapshot

    async def publish(self) -> WeightVersion:
        timeout_s = self._config.weights.publish_timeout_s
        reports = [
            actor.write_snapshot.options(concurrency_group=IO_GROUP).remote()
            for actor in self._actors
        ]
        parts = await asyncio.gather(
            *(answer(r, timeout_s, f"learner-{i}.write_snapshot") for i, r in enumerate(reports))
        )
        commit = self._actors[0].commit.options(concurrency_group=IO_GROUP)
        return await answer(
            commit.remote(self._snapshot, list(parts)), timeout_s, "learner-0.commit"
        )

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        """Waits for: every rank. The first rank to fail is what the caller sees."""
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        waits = [
            asyncio.ensure_future(answer(ref, timeout_s, f"learner-{i}.{method}"))
            for i, ref in enumerate(refs)
        ]
        try:
            return await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
