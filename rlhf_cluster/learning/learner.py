"""One rank of the learner: a plain object that an actor, or a test, drives.

    setup -> sft_step* -> train_step*, with snapshot and write_snapshot between them -> close

Every rank is given the same calls with the same arguments in the same order. Promises:
- `version` is the number of optimizer steps of reinforcement learning; a step that was skipped for
  gradients that are not finite counts, so that versions stay in step with the run.
- Master weights, gradients and moments are float32. Supervised steps have an optimizer of their
  own, gone before the first step of reinforcement learning, which starts with a fresh one.
- `snapshot` is all that publishing needs between two steps: a copy of this rank's own shards.
  `write_snapshot` reads that copy only, so it may run in another thread beside the next step.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from rlhf_cluster.algorithms import ALGORITHMS
from rlhf_cluster.config.run import RunConfig
from rlhf_cluster.data.examples import SftExample
from rlhf_cluster.errors import RunError, WeightError
from rlhf_cluster.learning.fsdp import (
    adamw,
    assert_float32,
    join_group,
    local_parts,
    shard,
    tensor_shapes,
)
from rlhf_cluster.learning.passes import Layout
from rlhf_cluster.learning.policy import PolicyLM, check_names, load_policy
from rlhf_cluster.learning.schedule import Schedule
from rlhf_cluster.learning.sft import sft_step
from rlhf_cluster.learning.train_step import train_step
from rlhf_cluster.learning.update import Updater
from rlhf_cluster.ports import StepReport
from rlhf_cluster.records import ExperienceGroup
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.store import write_shard


class LearnerRank:
    """Rank `rank` of `world_size`; all meet at `init_method` (tcp://host:port, on rank 0)."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        rank: int,
        world_size: int,
        init_method: str,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._rank, self._world_size = rank, world_size
        self._init_method = init_method
        self._clock = clock
        self._algorithm = ALGORITHMS[config.algorithm.type](config.algorithm)
        self._device = torch.device("cpu")
        self._policy: PolicyLM | None = None
        self._updater: Updater | None = None
        self._sft_updater: Updater | None = None
        self._num_sft_steps = 0
        self._version = 0
        self._snapshot: tuple[int, list[LocalPart]] | None = None
        self._snapshot_lock = threading.Lock()

    @property
    def version(self) -> int:
        """Optimizer steps of reinforcement learning that were taken."""
        return self._version

    @property
    def policy(self) -> PolicyLM:
        if self._policy is None:
            raise RunError(f"learner rank {self._rank} is not set up; call setup first")
        return self._policy

    def setup(self) -> dict[str, Any]:
        """Load and shard the model, and meet the other ranks; returns facts about the rank.

        Waits for the other ranks, at most `run.start_timeout_s`.

        Raises:
            ConfigError: a model that cannot be trained, sharded or published.
            StalledError: not all ranks came.
        """
        settings = self._config.learner
        self._use_device()
        compute = torch.bfloat16 if settings.dtype == "bfloat16" else torch.float32
        policy = load_policy(self._model_dir, torch.float32, self._device, True, compute)
        check_names(policy, self._model_dir)
        mesh = join_group(
            self._init_method,
            self._rank,
            self._world_size,
            self._device.type,
            self._config.run.start_timeout_s,
            settings.collective_timeout_s,
        )
        shard(policy, mesh, compute, settings.gradient_checkpointing)
        assert_float32(policy)
        self._policy = policy
        return {
            "rank": self._rank,
            "world_size": self._world_size,
            "device": str(self._device),
            "attention": policy.config._attn_implementation,
            "num_parameters": sum(p.numel() for p in policy.parameters()),
        }

    def sft_step(self, examples: list[SftExample]) -> dict[str, float]:
        """One supervised optimizer step; see `sft.sft_step`.

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
        return sft_step(self.policy, self._sft_updater, examples, step, self._layout)

    def train_step(self, groups: Sequence[ExperienceGroup]) -> StepReport:
        """One optimizer step on all groups; see `train_step.train_step`."""
        if self._updater is None:
            self._sft_updater = None
            self._updater = self._new_updater(self._schedule)
        metrics = train_step(
            self.policy,
            self._updater,
            self._algorithm,
            groups,
            self._version,
            self._config.staleness.max_staleness,
            self._layout,
            self._clock,
        )
        if self._version == 0:
            assert_float32(self.policy, self._updater.optimizer)
        self._version += 1
        return StepReport(step=self._version, metrics=metrics)

    def snapshot(self) -> int:
        """Copy this rank's shards to host memory in the published type; returns their version.

        A snapshot that was not written yet is replaced.
        """
        dtype = torch.bfloat16 if self._config.publish_dtype == "bfloat16" else torch.float32
        parts = []
        for part in local_parts(self.policy):
            keep = part.tensor.dtype if not part.tensor.is_floating_point() else dtype
            copied = part.tensor.to(keep, copy=True).to("cpu")
            parts.append(replace(part, tensor=copied))
        with self._snapshot_lock:
            self._snapshot = (self._version, parts)
        return self._version

    def write_snapshot(self, root: str) -> ShardReport:
        """Write the last snapshot as this rank's shard of its version. May run beside a step.

        After an error the snapshot is still there, to be written again.

        Raises:
            WeightError: there is no snapshot, or it cannot be written.
        """
        with self._snapshot_lock:
            taken = self._snapshot
        if taken is None:
            raise WeightError(
                f"learner rank {self._rank} has no snapshot to write; take one between two steps"
            )
        version, parts = taken
        report = write_shard(root, version, self._rank, parts)
        with self._snapshot_lock:
            if self._snapshot is taken:
                self._snapshot = None
        return report

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a complete version, as `store.commit` takes them."""
        return tensor_shapes(self.policy)

    def close(self) -> None:
        """Leave the group and drop the model. Safe to call twice."""
        self._policy = self._updater = self._sft_updater = None
        if dist.is_initialized():
            dist.destroy_process_group()

    def _use_device(self) -> None:
        if self._config.learner.num_gpus:
            self._device = torch.device("cuda", self._rank % torch.cuda.device_count())
            torch.cuda.set_device(self._device)
        else:
            torch.set_num_threads(1)

    def _new_updater(self, schedule: Schedule) -> Updater:
        settings = self._config.learner
        optimizer = adamw(self.policy, settings.beta1, settings.beta2, settings.weight_decay)
        return Updater(self.policy, optimizer, schedule, settings.max_grad_norm)

    @property
    def _schedule(self) -> Schedule:
        settings = self._config.learner
        return Schedule(
            peak=settings.learning_rate,
            kind=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=self._config.run.steps,
            minimum=settings.min_learning_rate,
        )

    @property
    def _layout(self) -> Layout:
        settings = self._config.learner
        return Layout(
            rank=self._rank,
            ranks=self._world_size,
            device=self._device,
            batching=settings.batching,
            tokens_per_micro_batch=settings.tokens_per_micro_batch,
            tokens_per_row=self._config.tokens_per_row,
            logprob_chunk_tokens=settings.logprob_chunk_tokens,
        )
