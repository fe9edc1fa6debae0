"""Actor of a rank, and the clients of all ranks, for reinforcement learning and offline stages.

Each rank runs its steps sequentially in one thread. Snapshots and checkpoints are written in other
threads ("io"), while the next step runs. Every rank gets all the data of a step and selects its share
by the same plan, so ranks do not exchange what to train on.

If a rank dies or hangs, the call to all ranks fails with a `CoreLost` that names it. If a rank raises
an error that another attempt may not see, the call fails with a `RankFailed` (`rlhf_cluster.failures`).
The other ranks, which wait for it in a collective, are then ended too (`actors.services.learner_core`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray

from actors.cluster.calls import core_answer, fetch_there
from actors.weights.transports import Transport
from rlhf_cluster.buffer.group_recovery import store_of
from rlhf_cluster.buffer.group_store import collect
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import WeightError, WorkerError
from rlhf_cluster.failures import as_rank_failure
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.observe.record.samples import keep_samples, write_samples
from rlhf_cluster.records import Handle, LearnerState, StepReport, TrainingGroup, WeightVersion
from rlhf_cluster.util.slow_disk import DiskDeadline
from rlhf_cluster.util.waiting import callee_deadline
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.sync import BasePlan
from rlhf_cluster.weights.transports.transport import Deadline
from rlhf_cluster.weights.writer_fence import Writer

log = logging.getLogger(__name__)

IO_GROUP = "io"  # three threads: publishing, its cancelling, a checkpoint
LIFE_GROUP = "life"
ACTOR_OPTIONS = {"concurrency_groups": {IO_GROUP: 3, LIFE_GROUP: 1}}
NO_RANK = -1
"""Rank number of a hot spare, until `enlist`."""
PUBLISHING = "weights.publish_timeout_s"

_P = ParamSpec("_P")
_T = TypeVar("_T")

BuildRank = Callable[[Any, str, int, int, str], Any]
"""Builds a `TrainingRank` of a configuration, model folder, rank, number of ranks and meeting point.

torch is imported by the call, so that a process answers before the import.
"""


def build_learner_rank(*place: Any) -> Any:
    """Build a rank of reinforcement learning; a `BuildRank`."""
    from rlhf_cluster.learner.learner_rank import LearnerRank

    return LearnerRank(*place)


def build_stage_rank(*place: Any, num_steps: int) -> Any:
    """Build a rank of an offline stage; a `BuildRank` once `num_steps` is bound."""
    from rlhf_cluster.learner.offline_rank import StageRank

    return StageRank(*place, num_steps=num_steps)


def judging(method: Callable[_P, _T], starting: bool = False) -> Callable[_P, _T]:
    """Wrap `method` so that errors that another attempt may not see become `RankFailed`."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            found = as_rank_failure(error, starting)
            if found is error:
                raise
            log.exception("%s failed", method.__name__)
            raise found from error

    return call


def failing_as_a_version(method: Callable[_P, _T]) -> Callable[_P, _T]:
    """Wrap `method`, which writes a version, so that storage errors become a `WeightError`.

    A passed deadline is treated in the same way. The newest weights are then published again, and the
    learner is not restarted.
    """

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(*args, **kwargs)
        except OSError as error:  # includes `StalledError`, which is a TimeoutError
            raise WeightError(
                f"{method.__name__}: the storage of the weights failed ({type(error).__name__}: "
                f"{error})"
            ) from error

    return call


class RankActor:
    """Actor of one rank of any training, `self._rank`, which `setup` builds."""

    def __init__(self, config: Any, model_dir: str, rank: int, build: BuildRank) -> None:
        self._config = config
        self._model_dir = model_dir
        self._number = rank
        self._build = build
        self._rank: Any = None
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._listener: socket.socket | None = None
        self._store: Any = None
        self._metrics: Any = None
        self._writing: Deadline | None = None
        self._tokenizer: Any = None
        self._transport: Any = None
        if isinstance(config, RunConfig):  # a stage publishes no versions
            self._transport = Transport(config)

    def warm(self) -> str:
        """Import the modules that `setup` needs. Returns a description of this process."""
        from rlhf_cluster.learner.training_rank import warm

        warm(self._config.learner, self._model_dir)
        return f"process {os.getpid()} on {ray.util.get_node_ip_address()}"

    def enlist(self, config: Any, rank: int) -> None:
        """Make this hot spare rank `rank` of the run of `config`; precedes every other call."""
        self._config, self._number = config, rank

    def rendezvous(self) -> str:
        """Listen on this node, and return the address at which the ranks meet. For rank 0 only."""
        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return f"tcp://{host}:{self._listener.getsockname()[1]}"

    def _open(self) -> None:
        """Open logs and metrics, and on rank 0 the store through which the ranks meet."""
        from actors.cluster.launch import check_code
        from actors.cluster.ray_metrics import RayMetrics
        from rlhf_cluster.observe.record.logs import configure
        from rlhf_cluster.util.process_group import serve_store

        check_code()
        name = f"learner-{self._number}"
        configure("learner", name, self._config.run_dir / "logs")
        self._metrics = RayMetrics("learner", {"run": self._config.run.name, "worker": name})
        if self._listener is not None:
            self._store = serve_store(self._listener)

    @functools.partial(judging, starting=True)
    def setup(self, init_method: str) -> dict[str, Any]:
        """Build the rank and set it up. Returns its facts."""
        config, model_dir = self._config, self._model_dir
        self._open()
        self._rank = self._build(config, model_dir, self._number, config.learner.ranks, init_method)
        facts = self._rank.setup()
        self._shapes = self._rank.tensor_shapes()
        if isinstance(config, RunConfig):  # a stage writes no samples
            self._tokenizer = load_tokenizer(config.model.tokenizer or model_dir)
        log.info("set up: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        return facts

    def run(self, method: str, *arguments: Any) -> Any:
        """Call `method` of the rank, where the actor itself has nothing to add."""
        return judging(getattr(self._rank, method))(*arguments)

    @judging
    def train_step(self, handles: list[tuple[int, Handle]]) -> StepReport:
        """Train one step on the groups of `handles`, and return its report.

        A group whose object is lost is read from its file.

        Args:
            handles: pairs of a ticket number and the handle. Ray passes a reference inside a list on
                without fetching the object.
        Raises: `StoreError` if the file of a lost group is missing too.
        """
        groups = collect(handles, fetch_there, store_of(self._config))
        report = self._rank.train_step(groups)
        if self._number == 0:
            log.info(
                "step %d: loss %.4g, gradient norm %.4g",
                report.step,
                report.metrics.get("learner/loss", math.nan),
                report.metrics.get("learner/grad_norm", math.nan),
            )
            self._metrics.record(report.metrics)
            write = functools.partial(
                write_samples,
                self._config.run_dir / "samples",
                report.step,
                groups,
                # The groups met the weights that this step began with.
                learner_version=report.step - 1,
                decode=self._tokenizer.decode,
                limit=self._config.observe.samples_per_step,
                kept=self._rank.kept,
            )
            keep_samples(write)
        return report

    @judging
    @failing_as_a_version
    def write_snapshot(self, base: int | None, writer: Writer, timeout_s: float) -> ShardReport:
        deadline = self._writing = Deadline(f"learner-{self._number}: the write", timeout_s)
        return self._patience(timeout_s, PUBLISHING).wait(
            f"a shard of a version in {self._config.weights_dir}",
            lambda: self._transport.write(self._rank, base, deadline, writer),
        )

    @judging
    @failing_as_a_version
    def commit(
        self, version: int, shards: list[ShardReport], writer: Writer, timeout_s: float
    ) -> WeightVersion:
        deadline = self._writing = Deadline(f"the commit of version {version}", timeout_s)
        published = self._patience(timeout_s, PUBLISHING).wait(
            f"version {version} in {self._config.weights_dir}",
            lambda: self._transport.commit(version, shards, self._shapes, deadline, writer),
        )
        log.info(
            "version %d published: %d bytes, %d stored",
            version,
            published.num_bytes,
            published.stored_bytes,
        )
        return published

    def cancel_publish(self) -> None:
        """Cancel the write or commit in progress, if there is one."""
        if self._writing is not None:
            self._writing.cancel()

    def refused(self, version: int, reason: str) -> None:
        log.warning("version %d was refused by every reader: %s", version, reason)

    @judging
    def write_state(self, root: str, timeout_s: float) -> Any:
        patience = self._patience(timeout_s, "checkpoint.timeout_s")
        return patience.wait(f"a shard in {root}", lambda: self._rank.write_state(root))

    @judging
    def commit_state(self, root: str, version: int, reports: list[Any], timeout_s: float) -> None:
        from rlhf_cluster.weights.store import commit

        commit(root, version, reports, keep=1, fsync=True, lock_timeout_s=timeout_s)
        log.info("state of version %d written to %s", version, root)

    @judging
    def load_state(self, folder: str, state: LearnerState) -> None:
        self._rank.load_state(folder, state)
        log.info("resumes from %s", folder)

    @ray.method(concurrency_group=LIFE_GROUP)
    def present(self, after_s: float) -> None:
        """Return after `after_s` seconds, which shows that the process is alive.

        It has its own thread, so other calls do not delay it.
        """
        if self._metrics is not None:
            self._metrics.gauge("learner/resident_bytes", resident_bytes())
        time.sleep(after_s)

    def _patience(self, timeout_s: float, setting: str) -> DiskDeadline:
        """Build the deadline of a disk write, which ends before the driver's call times out."""
        fraction = self._config.observe.slow_write_fraction
        return DiskDeadline(
            limit_s=timeout_s, setting=setting, told_fraction=fraction, tell=log.warning
        )

    def close(self) -> None:
        if self._rank is not None:
            self._rank.close()


class RayRanks:
    """Client that calls all ranks."""

    def __init__(self, actors: Sequence[Any], config: Any) -> None:
        self._actors = list(actors)
        self._config = config

    async def setup(self) -> list[dict[str, Any]]:
        timeout_s = self._config.run.start_timeout_s
        asked = self._actors[0].rendezvous.remote()
        where = await core_answer(asked, timeout_s, "learner-0.rendezvous")
        return await self._all("setup", timeout_s, where)

    async def copy_state(self) -> LearnerState:
        states = await self._run("copy_state", self._config.learner.step_timeout_s)
        if len({state.version for state in states}) != 1:
            raise WorkerError(f"learner ranks are at different versions: {states}; expected one")
        return replace(states[0], num_bytes=sum(state.num_bytes for state in states))

    async def write_state(self, folder: Path) -> None:
        """Write the state of all ranks into `folder`, then commit it.

        Waits for: every rank's write, then the commit, both within one deadline, which is shorter than
        `checkpoint.timeout_s`.
        """
        ends = time.monotonic() + callee_deadline(self._config.checkpoint.timeout_s)
        reports = await self._io("write_state", self._actors, ends, str(folder))
        version = reports[0].version
        await self._io("commit_state", self._actors[:1], ends, str(folder), version, reports)

    async def load_state(self, folder: Path, state: LearnerState) -> None:
        """Load `state` from `folder` on every rank.

        Waits for: every rank to read the complete state.
        """
        await self._all("load_state", self._config.run.start_timeout_s, str(folder), state)

    async def _io(self, method: str, actors: Sequence[Any], ends: float, *arguments: Any) -> Any:
        """Call `method` of `actors` in their "io" threads, and return the answers.

        The seconds that are left until `ends` are the last argument of each call.
        """
        left_s = max(0.0, ends - time.monotonic())
        refs = [
            getattr(a, method).options(concurrency_group=IO_GROUP).remote(*arguments, left_s)
            for a in actors
        ]
        return await self._answers(refs, left_s, method)

    async def _run(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        """Call a method of every rank that its actor passes on, and return the answers."""
        refs = [actor.run.remote(method, *arguments) for actor in self._actors]
        return await self._answers(refs, timeout_s, method)

    async def _run_step(self, method: str, data: Sequence[Any]) -> Any:
        """Call a method of every rank with `data`, which is stored once. Returns rank 0's answer."""
        timeout_s = self._config.learner.step_timeout_s
        return (await self._run(method, timeout_s, ray.put(list(data))))[0]

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return await self._answers(refs, timeout_s, method)

    async def _answers(self, refs: Sequence[Any], timeout_s: float, method: str) -> list[Any]:
        """Return the answers of all ranks, or raise the error of the first rank to fail.

        Waits for: every rank.
        """
        waits = [
            asyncio.ensure_future(core_answer(ref, timeout_s, f"learner-{i}.{method}"))
            for i, ref in enumerate(refs)
        ]
        try:
            return await asyncio.gather(*waits)
        finally:
            # `gather` leaves the others running when one raises.
            for wait in waits:
                wait.cancel()


class RayLearner(RayRanks):
    """`LearnerPort` that calls all ranks.

    `writer` identifies the attempt in every publish, and is set before the first one.
    """

    writer: Writer

    def __init__(self, actors: Sequence[Any], config: RunConfig) -> None:
        super().__init__(actors, config)
        self._snapshot = -1
        weights = config.weights
        anchor_every = {"full": 1, "delta": weights.anchor_every, "adapter": None}
        self._bases = BasePlan(anchor_every[weights.format])

    async def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        return await self._run_step("sft_step", examples)

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        handles = [(taken.ticket.number, taken.handle) for taken in groups]
        reports = await self._all("train_step", self._config.learner.step_timeout_s, handles)
        return reports[0]

    @property
    def snapshot_deadline_s(self) -> float:
        """Seconds for a snapshot, which after a failed publish waits for the current step."""
        return 2 * self._config.learner.step_timeout_s

    async def snapshot(self) -> int:
        versions = await self._run("snapshot", self.snapshot_deadline_s)
        if len(set(versions)) != 1:
            raise WorkerError(f"learner ranks are at different versions {versions}; expected one")
        self._snapshot = versions[0]
        return self._snapshot

    async def publish(self) -> WeightVersion:
        """Publish the last snapshot. If one rank fails, the writes of the others are cancelled.

        Waits for: every rank's write, then the commit, both within one deadline.
        """
        ends = time.monotonic() + self._config.weights.publish_timeout_s
        number, base = self._snapshot, self._bases.take_base()
        try:
            shards = await self._io("write_snapshot", self._actors, ends, base, self.writer)
            [version] = await self._io(
                "commit", self._actors[:1], ends, number, shards, self.writer
            )
        except BaseException:
            for actor in self._actors:
                actor.cancel_publish.options(concurrency_group=IO_GROUP).remote()
            raise
        self._bases.committed(number)
        return version

    async def refused(self, version: int, reason: str) -> None:
        """Log the refusal on every rank, and let the next version be a full one."""
        self._bases.take_base()
        for actor in self._actors:
            actor.refused.options(concurrency_group=IO_GROUP).remote(version, reason)


class RayStage(RayRanks):
    """Client that calls all ranks of a stage."""

    async def train(self, units: Sequence[Unit]) -> StepReport:
        return await self._run_step("train", units)

    async def evaluate(self, units: Sequence[Unit]) -> dict[str, float]:
        return await self._run_step("evaluate", units)

    async def report(self, units: Sequence[Unit]) -> dict[str, Any]:
        return await self._run_step("report", units)

    async def write_final(self, root: Path, writer: Writer) -> WeightVersion:
        timeout_s, folder = self._config.checkpoint.timeout_s, str(root)
        reports = await self._run("write_final", timeout_s, folder, writer.attempt)
        ref = self._actors[0].run.remote("commit_final", folder, reports, timeout_s, writer)
        return (await self._answers([ref], timeout_s, "commit_final"))[0]
