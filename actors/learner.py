"""The learner ranks as actors, and the group of them as the learner port.

Each rank runs its steps one after the other in one thread; writing a snapshot to the weight store, or
a checkpoint, runs in others ("io"), beside the next step. Every rank gets every group of a step and
takes its own part by the same plan, so no rank has to tell another what to train on.

A rank that dies or hangs fails the whole step with a `CoreLost` that names it. The others, which wait
for it in a collective, are ended with it (`actors.core`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from actors.calls import core_answer, fetch_there
from actors.transports import transport_of
from rlhf_cluster.checkpoint.state import LearnerState
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.examples import SftExample
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.experience.recovery import store_of
from rlhf_cluster.experience.store import collect
from rlhf_cluster.observe.samples import write_samples
from rlhf_cluster.ports import StepReport, Taken
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights.sync import BasePlan, DurablePlan
from rlhf_cluster.weights.transport import Deadline

log = logging.getLogger(__name__)

IO_GROUP = "io"  # three threads: publishing, its cancelling, a checkpoint
LIFE_GROUP = "life"
ACTOR_OPTIONS = {"concurrency_groups": {IO_GROUP: 3, LIFE_GROUP: 1}}


class LearnerActor:
    """One rank. torch is imported in `setup`, so that the process is up before the model is."""

    def __init__(self, config: RunConfig, model_dir: str, rank: int) -> None:
        self._config = config
        self._model_dir = model_dir
        self._number = rank
        self._rank: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tokenizer: Any = None
        self._transport = transport_of(config)
        self._writing: Deadline | None = None
        self._listener: socket.socket | None = None
        self._store: Any = None

    def rendezvous(self) -> str:
        """Where the ranks meet: this node, where rank 0 listens from now on. Asked of rank 0 only."""
        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return f"tcp://{host}:{self._listener.getsockname()[1]}"

    def setup(self, init_method: str) -> dict[str, Any]:
        from actors.metrics import RayMetrics
        from rlhf_cluster.learning.learner import LearnerRank
        from rlhf_cluster.learning.process_group import serve_store
        from rlhf_cluster.observe.logs import configure

        name = f"learner-{self._number}"
        configure("learner", name, self._config.run_dir / "logs")
        self._metrics = RayMetrics("learner", {"worker": name})
        if self._listener is not None:
            self._store = serve_store(self._listener)
        ranks = self._config.learner.ranks
        self._rank = LearnerRank(self._config, self._model_dir, self._number, ranks, init_method)
        facts = self._rank.setup()
        self._shapes = self._rank.tensor_shapes()
        self._tokenizer = load_tokenizer(self._config.model.tokenizer or self._model_dir)
        log.info("set up: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        return facts

    def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        return self._rank.sft_step(examples)

    def train_step(self, handles: list[tuple[int, list[Any]]]) -> StepReport:
        """`handles` are by ticket number, each in a list, so that Ray passes it on as it is. A group
        whose object is gone is read from its file. Raises `StoreError` when that is gone too."""
        wanted = [(number, handle) for number, [handle] in handles]
        groups = collect(wanted, fetch_there, store_of(self._config))
        report = self._rank.train_step(groups)
        if self._number == 0:
            log.info(
                "step %d: loss %.4g, gradient norm %.4g",
                report.step,
                report.metrics.get("learner/loss", math.nan),
                report.metrics.get("learner/grad_norm", math.nan),
            )
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

    def write_snapshot(self, base: int | None, durable: bool, timeout_s: float) -> Any:
        deadline = self._writing = Deadline(f"learner-{self._number}: the write", timeout_s)
        return self._transport.write(self._rank, base, durable, deadline)

    def commit(
        self, version: int, shards: list[Any], durable: bool, timeout_s: float
    ) -> WeightVersion:
        deadline = self._writing = Deadline(f"the commit of version {version}", timeout_s)
        published = self._transport.commit(version, shards, self._shapes, durable, deadline)
        log.info(
            "version %d published: %d bytes, %d stored",
            version,
            published.num_bytes,
            published.stored_bytes,
        )
        return published

    def cancel_publish(self) -> None:
        """End the write or the commit under way, if there is one."""
        if self._writing is not None:
            self._writing.cancel()

    def refused(self, version: int, reason: str) -> None:
        log.warning("version %d was refused by every reader: %s", version, reason)

    def copy_state(self) -> LearnerState:
        return self._rank.copy_state()

    def write_state(self, root: str, timeout_s: float) -> Any:
        return self._rank.write_state(root)

    def commit_state(self, root: str, version: int, reports: list[Any], timeout_s: float) -> None:
        from rlhf_cluster.weights.store import commit

        commit(root, version, reports, keep=1, fsync=True, lock_timeout_s=timeout_s)
        log.info("state of version %d written to %s", version, root)

    def load_state(self, folder: str, state: LearnerState) -> None:
        self._rank.load_state(folder, state)
        log.info("goes on from %s", folder)

    @ray.method(concurrency_group=LIFE_GROUP)
    def present(self, after_s: float) -> None:
        """Answer after so many seconds, whatever the other threads do: the process lives."""
        time.sleep(after_s)

    def close(self) -> None:
        if self._rank is not None:
            self._rank.close()


class RayLearner:
    """`LearnerPort` over all ranks."""

    def __init__(self, actors: Sequence[Any], config: RunConfig) -> None:
        self._actors = list(actors)
        self._config = config
        self._snapshot = -1
        weights = config.weights
        anchor_every = {"full": 1, "delta": weights.anchor_every, "adapter": None}
        self._bases = BasePlan(anchor_every[weights.format])
        self._durable = DurablePlan(weights.durable_every, config.run.steps)

    async def setup(self) -> list[dict[str, Any]]:
        timeout_s = self._config.run.start_timeout_s
        asked = self._actors[0].rendezvous.remote()
        where = await core_answer(asked, timeout_s, "learner-0.rendezvous")
        return await self._all("setup", timeout_s, where)

    async def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        shared = ray.put(examples)
        return (await self._all("sft_step", self._config.learner.step_timeout_s, shared))[0]

    async def train_step(self, groups: Sequence[Taken]) -> StepReport:
        handles = [(taken.ticket.number, taken.handle) for taken in groups]
        reports = await self._all("train_step", self._config.learner.step_timeout_s, handles)
        return reports[0]

    async def snapshot(self) -> int:
        versions = await self._all("snapshot", self._config.learner.step_timeout_s)
        if len(set(versions)) != 1:
            raise WorkerError(f"learner ranks are at different versions {versions}; expected one")
        self._snapshot = versions[0]
        return self._snapshot

    async def publish(self) -> WeightVersion:
        """Waits for: every rank's write, then the commit, both within one deadline.

        When one fails, the others are cancelled.
        """
        ends = time.monotonic() + self._config.weights.publish_timeout_s
        number, durable = self._snapshot, self._durable.wants(self._snapshot)
        base = self._bases.take_base()
        if durable and self._config.weights.transport != "files":
            base = None  # files hold no version that it could build on
        try:
            shards = await self._io("write_snapshot", self._actors, ends, base, durable)
            [version] = await self._io("commit", self._actors[:1], ends, number, shards, durable)
        except BaseException:
            for actor in self._actors:
                actor.cancel_publish.options(concurrency_group=IO_GROUP).remote()
            raise
        self._bases.committed(number, in_full=base is None)
        self._durable.committed(number, durable)
        return version

    async def copy_state(self) -> LearnerState:
        states = await self._all("copy_state", self._config.learner.step_timeout_s)
        if len({state.version for state in states}) != 1:
            raise WorkerError(f"learner ranks are at different versions: {states}; expected one")
        return replace(states[0], num_bytes=sum(state.num_bytes for state in states))

    async def write_state(self, folder: Path) -> None:
        """Waits for: every rank's write, then the commit, both within one deadline."""
        ends = time.monotonic() + self._config.checkpoint.timeout_s
        reports = await self._io("write_state", self._actors, ends, str(folder))
        version = reports[0].version
        await self._io("commit_state", self._actors[:1], ends, str(folder), version, reports)

    async def load_state(self, folder: Path, state: LearnerState) -> None:
        """Waits for: every rank to read all of it."""
        await self._all("load_state", self._config.run.start_timeout_s, str(folder), state)

    async def refused(self, version: int, reason: str) -> None:
        """Every rank logs it; the next version builds on none."""
        self._bases.take_base()
        for actor in self._actors:
            actor.refused.options(concurrency_group=IO_GROUP).remote(version, reason)

    async def _io(self, method: str, actors: Sequence[Any], ends: float, *arguments: Any) -> Any:
        """The answers of `actors`, from their second threads; they get the seconds left as well."""
        left_s = max(0.0, ends - time.monotonic())
        refs = [
            getattr(a, method).options(concurrency_group=IO_GROUP).remote(*arguments, left_s)
            for a in actors
        ]
        return await self._answers(refs, left_s, method)

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return await self._answers(refs, timeout_s, method)

    async def _answers(self, refs: Sequence[Any], timeout_s: float, method: str) -> list[Any]:
        """Waits for: every rank. The first rank to fail is what the caller sees."""
        waits = [
            asyncio.ensure_future(core_answer(ref, timeout_s, f"learner-{i}.{method}"))
            for i, ref in enumerate(refs)
        ]
        try:
            return await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
