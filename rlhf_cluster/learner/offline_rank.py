"""Learner rank of an offline stage: a plain object that an actor, or a test, calls.

    setup -> [load_state] -> train*, with evaluate and copy_state between them -> write_final -> close

Every rank gets the same calls with the same units in the same order. It gets all units of a batch; the
plan selects each rank's share. Promises:
- a step is one optimizer step on the complete batch. Apart from rounding it depends neither on the
  number of ranks nor on the split of units into micro-batches;
- an evaluation computes the stage's loss and metrics without a gradient, and changes nothing;
- only the loss depends on the type of the stage.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.config.stage_config import StageConfig
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.units import Unit, flatten_units
from rlhf_cluster.errors import RunError
from rlhf_cluster.learner import publish
from rlhf_cluster.learner.learner_reference import (
    FollowingCopy,
    FrozenCopy,
    Reference,
    StartAdapters,
)
from rlhf_cluster.learner.rank_checkpoint import Stateful
from rlhf_cluster.learner.sharding.sharded_model import assert_float32
from rlhf_cluster.learner.step import passes
from rlhf_cluster.learner.step.critic import ValueLM
from rlhf_cluster.learner.step.optimizer_step import Updater
from rlhf_cluster.learner.step.passes import MetricSums
from rlhf_cluster.learner.training_rank import TrainingRank
from rlhf_cluster.models.policy_model import PolicyLM
from rlhf_cluster.offline import build_stage
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.records import StepReport, WeightVersion
from rlhf_cluster.weights.manifest import LocalPart, ShardReport
from rlhf_cluster.weights.shards import send_shard
from rlhf_cluster.weights.store import commit
from rlhf_cluster.weights.transports.shared_files import FileSink
from rlhf_cluster.weights.writer_fence import Writer

PerUnit = list[tuple[np.ndarray, ...]]

CLASSIFIER_HEAD = "score.weight"
"""Name of the head of values in a Hugging Face sequence-classification model."""


class StageRank(TrainingRank[StageConfig]):
    """Rank `rank` of the `world_size` ranks of a stage with `num_steps` steps."""

    def __init__(
        self,
        config: StageConfig,
        model_dir: str,
        rank: int,
        world_size: int,
        init_method: str | None,
        num_steps: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        super().__init__(config, model_dir, rank, world_size, init_method)
        self.stage = build_stage(config.stage, StageContext(data=config.data))
        self._num_steps = num_steps
        self._clock = clock
        self._updater: Updater | None = None
        self._reference: Reference | None = None
        self._teacher: Reference | None = None

    def setup(self) -> dict[str, Any]:
        """Load and shard the model, and meet the other ranks; returns facts about the rank.

        Raises `ConfigError`, `StalledError`.
        Waits for: the other ranks, at most `run.start_timeout_s`.
        """
        self._use_device()
        model: PolicyLM | ValueLM = self._load_policy()
        if self._is_value:
            model = ValueLM(model, cast(Any, self._config.stage).num_values, bias=False)
        mesh = self._join()
        self._model = self._shard(model, mesh)
        assert_float32(self._model)
        head = self._config.learner.head_dtype
        if self.stage.needs_reference:
            if self._config.learner.lora is not None:
                self._reference = StartAdapters(self._model)
            elif self.stage.reference_moves:
                self._reference = FollowingCopy(
                    self._model_dir, mesh, self._device, self._compute, head
                )
            else:
                self._reference = FrozenCopy(
                    self._model_dir, mesh, self._device, self._compute, head_dtype=head
                )
        if self.stage.teacher is not None:
            vocabulary = self.policy.config.get_text_config().vocab_size
            self._teacher = FrozenCopy(
                self.stage.teacher,
                mesh,
                self._device,
                self._compute,
                vocabulary,
                head_dtype=head,
            )
        return self._facts()

    def train(self, units: Sequence[Unit]) -> StepReport:
        """Run one optimizer step on all units.

        Raises:
            DivergenceError: gradients were not finite in several consecutive steps.
        """
        started = self._clock()
        updater = self._begin()
        metrics = self._passes(units)
        computed = self._clock()
        metrics |= updater.apply(self._version)
        if self._version == 0:
            assert_float32(self.model)
        self._version += 1
        self._move_reference()
        metrics |= self.stage.metrics(units)
        metrics["learner/forward_backward_s"] = computed - started
        metrics["learner/optimizer_s"] = self._clock() - computed
        return StepReport(step=self._version, metrics=metrics)

    @torch.no_grad()
    def evaluate(self, units: Sequence[Unit]) -> dict[str, float]:
        """Compute the stage's metrics of `units`, over all ranks."""
        with self._whole_after():
            return self._passes(units)

    @torch.no_grad()
    def report(self, units: Sequence[Unit]) -> dict[str, Any]:
        """Compute the stage's report about the trained model; see `Stage.report`."""
        return self.stage.report(units, self)

    def write_final(self, root: str, attempt: int = 0) -> ShardReport:
        """Write this rank's shard of the trained weights, named as in a Hugging Face model.

        `attempt`: number of the run's attempt.
        """
        dtype = torch.bfloat16 if self._config.run.export_dtype == "bfloat16" else torch.float32
        is_rounded = self._config.learner.lora is not None and dtype == torch.bfloat16
        parts = publish.host_copy(self._named_parts(self._version if is_rounded else None), dtype)
        sink = FileSink(root, fsync=True, attempt=attempt)
        return send_shard([sink], self._version, self._rank, parts)

    def commit_final(
        self, root: str, reports: Sequence[ShardReport], timeout_s: float, writer: Writer
    ) -> WeightVersion:
        """Commit the shards that the `write_final` of all ranks wrote, as the only version of `root`.

        Waits for: the lock of the folder, at most `timeout_s`.
        """
        return commit(
            root,
            reports[0].version,
            reports,
            keep=1,
            expected_names=self.tensor_shapes(),
            fsync=True,
            lock_timeout_s=timeout_s,
            writer=writer,
        )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return name and shape of every tensor that the `write_final` of all ranks produces."""
        shapes = publish.tensor_shapes(self.model)
        return {self._published_name(name): shape for name, shape in shapes.items()}

    # Passes that a stage's loss may ask for: `offline.stage.Passes`.

    def logprobs(self, units: Sequence[Unit]) -> PerUnit:
        return self._score_units(units, lambda s, sizes: self._score(self.model, s, sizes))

    def reference(self, units: Sequence[Unit]) -> PerUnit:
        if self._reference is None:
            raise RunError(
                f"stage {self._config.stage.type!r} asks for a reference it did not announce; set "
                "needs_reference in its class"
            )
        with self._reference.as_policy() as policy:
            return self._score_units(units, lambda s, sizes: self._score(policy, s, sizes))

    def values(self, units: Sequence[Unit]) -> PerUnit:
        num_values = cast(ValueLM, self.model.module).num_values
        width = () if num_values == 1 else (num_values,)
        return self._score_units(
            units, lambda s, sizes: passes.score_values(self.model, s, self._layout, sizes), width
        )

    def _move_reference(self) -> None:
        share = self.stage.reference_share(self._version)
        if share and isinstance(self._reference, FollowingCopy):
            self._reference.follow(self.model, share)
            self.stage.reference_moved()

    def _score(
        self, policy: Any, sequences: list[TokenSequence], sizes: list[int]
    ) -> dict[int, np.ndarray]:
        return passes.score(policy, sequences, 1.0, self._layout, unit_sizes=sizes)

    @torch.no_grad()
    def _score_units(
        self,
        units: Sequence[Unit],
        score: Callable[[list[TokenSequence], list[int]], dict[int, np.ndarray]],
        width: tuple[int, ...] = (),
    ) -> PerUnit:
        """Compute values of every sequence of `units` with `score`, and gather those of all ranks.

        Waits for: all ranks.
        """
        sequences, sizes = flatten_units(units)
        with self._whole_after():
            own = score(sequences, sizes)
        lengths = [len(sequence.target_ids) for sequence in sequences]
        found = iter(passes.on_every_rank(own, lengths, self._layout, width))
        return [tuple(next(found) for _ in unit.sequences) for unit in units]

    def _passes(self, units: Sequence[Unit]) -> dict[str, float]:
        """Run all passes of a batch, with gradients if they are enabled.

        Returns the metrics over all ranks.
        """
        sequences, sizes = flatten_units(units)
        loss: Any = self.stage.loss(units, self)
        count = len(passes.own_plan(sequences, self._layout, sizes)) * self._world_size

        def noted(trained: Any) -> tuple[Tensor, Sums]:
            share, found = loss(trained)
            one = torch.tensor(1 / count, dtype=torch.float64, device=share.device)
            return share, {**found, "stage/loss": (share, one)}

        sums, streams = MetricSums(), self.stage.streams
        if self._is_value:
            passes.run_value_passes(
                self.model, sequences, streams, self._layout, noted, sums, sizes
            )
        else:
            passes.run_passes(
                self.model,
                sequences,
                streams,
                1.0,
                self._layout,
                noted,
                sums,
                reference=self._teacher,
                unit_sizes=sizes,
                divergence=self.stage.divergence,
            )
        return sums.reduce()

    @contextmanager
    def _whole_after(self) -> Iterator[None]:
        """Reshard the model after the block: passes without backward leave the root gathered."""
        yield
        if isinstance(self.model.module, FSDPModule):
            self.model.module.reshard()

    @property
    def _is_value(self) -> bool:
        return self._config.stage.model_kind == "value"

    def _named_parts(self, streams_of: int | None = None) -> Iterator[LocalPart]:
        for part in publish.local_parts(self.model, streams_of=streams_of):
            yield replace(part, name=self._published_name(part.name))

    def _published_name(self, name: str) -> str:
        """Convert a name of `publish` to that in a Hugging Face model."""
        if not self._is_value:
            return name
        if name == "value_head.weight":
            return CLASSIFIER_HEAD
        prefix: str = cast(Any, self.model.module.lm).base_model_prefix
        return f"{prefix}.{name}"

    @property
    def _updaters(self) -> dict[str, Updater]:
        return {} if self._updater is None else {"policy": self._updater}

    @property
    def _stateful(self) -> Stateful:
        return self.stage

    @property
    def _further(self) -> Iterator[LocalPart]:
        if isinstance(self._reference, FollowingCopy):
            for part in self._reference.shards():
                yield replace(part, name=f"reference/followed/{part.name}")

    def _begin(self) -> Updater:
        if self._updater is None:
            self._updater = self._new_updater(self._schedule_over(self._num_steps))
        return self._updater

    def _drop(self) -> None:
        super()._drop()
        self._updater = self._reference = self._teacher = None
