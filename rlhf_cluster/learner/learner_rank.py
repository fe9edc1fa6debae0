"""Learner rank of reinforcement learning: a plain object that an actor, or a test, calls.

    setup -> sft_step* -> train_step*, with snapshot and write_snapshot between them -> close

Every rank gets the same calls with the same arguments in the same order. Promises:
- `version` is the number of steps of reinforcement learning. Each has `learner.epochs` times
  `learner.minibatches` optimizer steps. Optimizer steps that are skipped, because gradients are not
  finite, are counted too, so that versions match the steps of the run. The ids of their rollouts are
  written to `skipped/` in the run directory;
- supervised steps have a separate optimizer. It is dropped before the first step of reinforcement
  learning, which starts with a new one. A checkpoint has only the state after supervised steps;
- an algorithm with a critic has a value model or a value head in addition to the policy. It is never
  published;
- publishing needs only `snapshot` between two steps: a copy of this rank's shards. `write_snapshot`
  reads only that copy, so it may run in another thread, concurrently with the next step.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from rlhf_cluster.algorithms import build_algorithm
from rlhf_cluster.algorithms.algorithm import CriticAlgorithm
from rlhf_cluster.config.run_config import RunConfig
from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.errors import RunError, WeightError
from rlhf_cluster.learner.learner_reference import FrozenCopy, Reference, StartAdapters
from rlhf_cluster.learner.publish import (
    Bases,
    ChangedShare,
    Frozen,
    anchor_parts,
    frozen,
    host_copy,
    local_parts,
    tensor_shapes,
)
from rlhf_cluster.learner.rank_checkpoint import Stateful
from rlhf_cluster.learner.reward_normalizer import Joined, RunningNormalizer
from rlhf_cluster.learner.sharding.fsdp2 import Fsdp2Model
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel, assert_float32
from rlhf_cluster.learner.step.critic import Critic, load_value_model, new_critic, sharded_head
from rlhf_cluster.learner.step.optimizer_step import Schedule, Updater
from rlhf_cluster.learner.step.train_step import StepSettings, sft_step, train_step
from rlhf_cluster.learner.token_samples import KeptTokens
from rlhf_cluster.learner.training_rank import TrainingRank
from rlhf_cluster.records import ExperienceGroup, StepReport, TokenSample
from rlhf_cluster.util.waiting import callee_deadline
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.transports.transport import ShardSink


class LearnerRank(TrainingRank[RunConfig]):
    """Rank `rank` of `world_size`. All ranks meet at `init_method`, see `process_group.join_group`."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        rank: int,
        world_size: int,
        init_method: str | None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(config, model_dir, rank, world_size, init_method)
        self._clock = clock
        self._algorithm = build_algorithm(
            config.trained_algorithm, config.generation.max_response_tokens
        )
        self._normalizer = RunningNormalizer.of(config.scoring)
        self._updater: Updater | None = None
        self._sft_updater: Updater | None = None
        self._value_model: ShardedModel | None = None
        self._critic: Critic | None = None
        self._reference: Reference | None = None
        self._num_sft_steps = 0
        self._snapshot: tuple[int, list[LocalPart]] | None = None
        self._snapshot_lock = threading.Lock()
        self._changed = ChangedShare(callee_deadline(config.learner.step_timeout_s) / 2)
        self._bases = Bases(rank, config.weights.format)
        self.kept: dict[str, TokenSample] = {}
        self._frozen: Frozen | None = None  # only if versions are adapters

    def setup(self) -> dict[str, Any]:
        """Load and shard the model, and meet the other ranks; returns facts about the rank.

        Raises:
            ConfigError: the model cannot be trained, sharded or published.
            StalledError: not all ranks came in time.
        Waits for: the other ranks, at most `run.start_timeout_s`.
        """
        settings, compute = self._config.learner, self._compute
        self._use_device()
        policy = self._load_policy()
        mesh = self._join()
        self._model = self._shard(policy, mesh)
        assert_float32(self._model)
        if self._algorithm.needs_critic:
            if self._config.critic.kind == "head":
                self._value_model = Fsdp2Model(sharded_head(policy, mesh), self._adamw)
            else:
                outlined = settings.backend == "fsdp2"
                value_model = load_value_model(self._model_dir, self._device, compute, outlined)
                self._value_model = self._shard(value_model, mesh)
        if self._config.weights.format == "adapter":
            self._frozen = frozen(self._model, self._publish_dtype)
        if self._algorithm.full_kl_in is not None:
            if settings.lora is not None:
                self._reference = StartAdapters(self._model)
            else:
                self._reference = FrozenCopy(
                    self._model_dir, mesh, self._device, compute, head_dtype=settings.head_dtype
                )
        return self._facts()

    def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        """Run one supervised optimizer step; see `train_step.sft_step`.

        Raises:
            RunError: reinforcement learning has begun.
        """
        if self._updater is not None:
            raise RunError(
                f"supervised step after version {self._version}: it comes before reinforcement "
                "learning, never between its steps"
            )
        if self._sft_updater is None:
            sft = self._config.sft
            schedule = Schedule(peak=sft.learning_rate, warmup_steps=sft.warmup_steps)
            self._sft_updater = self._new_updater(schedule)
        step, self._num_sft_steps = self._num_sft_steps, self._num_sft_steps + 1
        return sft_step(self.model, self._sft_updater, examples, step, self._layout)

    def train_step(self, groups: Sequence[ExperienceGroup]) -> StepReport:
        """Run one step on all groups; see `train_step.train_step`.

        After two snapshots, the report has the share of elements that differ between the last two of
        them, compared as bfloat16. Sets `kept`: the token samples of the first
        `observe.samples_per_step` rollouts by rollout id.
        """
        updater, kept = self._begin(), KeptTokens(self._config.observe.samples_per_step)
        metrics = train_step(
            self.model,
            updater,
            self._algorithm,
            self._normalizer.apply(groups),
            self._version,
            StepSettings.of(self._config),
            self._layout,
            self._clock,
            kept,
            self._record_skip,
            self._critic,
            self._reference,
        )
        self.kept = kept.found
        metrics |= self._normalizer.metrics()
        if self._version == 0:
            assert_float32(self.model)
            if self._value_model is not None:
                assert_float32(self._value_model)
        self._version += 1
        metrics |= self._changed.take(self._device)
        return StepReport(step=self._version, metrics=metrics)

    def snapshot(self) -> int:
        """Copy this rank's shards to host memory in the published type; returns their version.

        A snapshot that was not written yet is replaced.
        """
        as_adapters = self._frozen is not None
        streams_of = self._version if self._config.publish_rounding == "stochastic" else None
        parts = host_copy(local_parts(self.model, as_adapters, streams_of), self._publish_dtype)
        self._changed.copied(parts, self._frozen.num_unadapted if self._frozen is not None else 0)
        with self._snapshot_lock:
            self._snapshot = (self._version, parts)
        return self._version

    def write_snapshot(self, to: str | Sequence[ShardSink], base: int | None = None) -> ShardReport:
        """Write the last snapshot as this rank's shard of its version.

        May run concurrently with a step. After an error the snapshot can be written again.

        Args:
            to: the sinks, or a folder.
            base: version that this rank wrote last, to store only the difference; or the last anchor
                that it wrote, to store only the adapters.
        Raises:
            WeightError: there is no snapshot, it cannot be written, or `base` is another version.
            StalledError: a sink's deadline passed.
        """
        with self._snapshot_lock:
            taken = self._snapshot
        if taken is None:
            raise WeightError(
                f"learner rank {self._rank} has no snapshot to write; take one between two steps"
            )
        version, parts = taken
        written = self._bases.find(base)
        if self._frozen is not None and written is None:
            parts = [*anchor_parts(self.model, self._frozen, self._publish_dtype), *parts]
        sinks = [FileSink(to)] if isinstance(to, str) else to
        report = send_shard(sinks, version, self._rank, parts, written)
        with self._snapshot_lock:
            if self._snapshot is taken:
                self._snapshot = None
        self._bases.wrote(version, parts, written)
        return report

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor of a complete version, for `store.commit`."""
        return tensor_shapes(self.model)

    def _drop(self) -> None:
        self._changed.close()
        self._close_models([m for m in (self._value_model, self._model) if m is not None])
        self._model = self._updater = self._sft_updater = self._frozen = None
        self._value_model = self._critic = self._reference = None

    @property
    def _updaters(self) -> dict[str, Updater]:
        """Updaters of reinforcement learning by model; {} before its first step."""
        critic = {} if self._critic is None else {"critic": self._critic.updater}
        return {} if self._updater is None else {"policy": self._updater, **critic}

    @property
    def _stateful(self) -> Stateful:
        return Joined(self._algorithm, self._normalizer)

    def _begin(self) -> Updater:
        """Return the updater of reinforcement learning; the first call builds it and the critic."""
        if self._updater is None:
            self._sft_updater = None
            self._updater = self._new_updater(self._schedule)
            self._critic = self._new_critic()
        return self._updater

    def _new_critic(self) -> Critic | None:
        if self._value_model is None:
            return None
        algorithm = cast(CriticAlgorithm, self._algorithm)
        return new_critic(self._config.critic, self.model, self._value_model, algorithm)

    @property
    def _publish_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._config.publish_dtype == "bfloat16" else torch.float32

    def _record_skip(self, update: int, rollout_ids: list[str]) -> None:
        if self._rank:
            return
        folder = self._config.run_dir / "skipped"
        folder.mkdir(parents=True, exist_ok=True)
        record = {"optimizer_step": update, "version": self._version, "rollout_ids": rollout_ids}
        (folder / f"{update:08d}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")

    @property
    def _schedule(self) -> Schedule:
        return self._schedule_over(
            self._config.run.steps * StepSettings.of(self._config).num_updates
        )
