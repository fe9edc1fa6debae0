"""Learner ranks as actors, and all of them as the learner port; see `actors.services.rank_actors`.

A snapshot is written to the weight store while the next step runs. Every rank gets every group of a
step and selects its share by the same plan, so ranks do not exchange what to train on.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import ray

from actors.cluster.calls import fetch_there
from actors.services.rank_actors import (
    IO_GROUP,
    RankActor,
    RayRanks,
    judging,
)
from actors.weights.transports import Transport
from rlhf_cluster.buffer.group_recovery import store_of
from rlhf_cluster.buffer.group_store import collect
from rlhf_cluster.config import RunConfig
from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import WeightError, WorkerError
from rlhf_cluster.observe.record.samples import keep_samples, write_samples
from rlhf_cluster.records import (
    Handle,
    StepReport,
    TrainingGroup,
    WeightVersion,
)
from rlhf_cluster.weights.manifest import ShardReport
from rlhf_cluster.weights.sync import BasePlan
from rlhf_cluster.weights.transports.transport import Deadline
from rlhf_cluster.weights.writer_fence import Writer

log = logging.getLogger(__name__)

PUBLISHING = "weights.publish_timeout_s"
_P = ParamSpec("_P")
_T = TypeVar("_T")


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


class LearnerActor(RankActor):
    """One rank of reinforcement learning."""

    def __init__(self, config: RunConfig, model_dir: str, rank: int) -> None:
        super().__init__(config, model_dir, rank)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._tokenizer: Any = None
        self._transport = Transport(config)
        self._writing: Deadline | None = None

    @functools.partial(judging, starting=True)
    def setup(self, init_method: str) -> dict[str, Any]:
        from rlhf_cluster.learner.learner_rank import LearnerRank

        self._open()
        ranks = self._config.learner.ranks
        self._rank = LearnerRank(self._config, self._model_dir, self._number, ranks, init_method)
        facts = self._rank.setup()
        self._shapes = self._rank.tensor_shapes()
        self._tokenizer = load_tokenizer(self._config.model.tokenizer or self._model_dir)
        log.info("set up: %s", ", ".join(f"{key} {value}" for key, value in facts.items()))
        return facts

    @judging
    def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        return self._rank.sft_step(examples)

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
                learner_version=report.step - 1,
                decode=self._tokenizer.decode,
                limit=self._config.observe.samples_per_step,
                kept=self._rank.kept,
            )
            keep_samples(write)
        return report

    @judging
    def snapshot(self) -> int:
        return self._rank.snapshot()

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
        shared = ray.put(examples)
        return (await self._all("sft_step", self._config.learner.step_timeout_s, shared))[0]

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        handles = [(taken.ticket.number, taken.handle) for taken in groups]
        reports = await self._all("train_step", self._config.learner.step_timeout_s, handles)
        return reports[0]

    @property
    def snapshot_deadline_s(self) -> float:
        """Seconds for a snapshot, which after a failed publish waits for the current step."""
        return 2 * self._config.learner.step_timeout_s

    async def snapshot(self) -> int:
        versions = await self._all("snapshot", self.snapshot_deadline_s)
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
