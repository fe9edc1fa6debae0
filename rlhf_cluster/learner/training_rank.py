"""Base class of a rank that trains a sharded model, for any kind of training.

    loading -> meeting the others -> sharding -> passes and steps -> copies of its state -> end

`learner_rank.LearnerRank` trains a policy by reinforcement learning, `offline_rank.StageRank` any model
on existing data. Promises:
- master weights, gradients and moments are float32;
- a checkpoint needs only `copy_state` between two steps. After `load_state` of what `write_state`
  wrote, training continues as if it had not been interrupted (`learner.rank_checkpoint`).
"""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from rlhf_cluster.errors import RunError
from rlhf_cluster.learner.rank_checkpoint import StateCopies, Stateful, load
from rlhf_cluster.learner.sharding.fsdp2 import Fsdp2Model, shard
from rlhf_cluster.learner.sharding.lora import adapting, add_adapters
from rlhf_cluster.learner.sharding.qlora import stands_for
from rlhf_cluster.learner.sharding.sharded_loading import load_shards
from rlhf_cluster.learner.sharding.sharded_model import AdamWSettings, ShardedModel
from rlhf_cluster.learner.sharding.zero3 import import_deepspeed, leave_group, partition
from rlhf_cluster.learner.step.critic import ValueLM, shard_value_model
from rlhf_cluster.learner.step.optimizer_step import Schedule, Updater
from rlhf_cluster.learner.step.passes import Layout
from rlhf_cluster.models.policy_model import (
    PolicyLM,
    check_distribution,
    check_names,
    load_policy,
    outline_policy,
)
from rlhf_cluster.records import LearnerState
from rlhf_cluster.sections.values import limit_memory
from rlhf_cluster.util.process_group import join_group
from rlhf_cluster.util.waiting import callee_deadline
from rlhf_cluster.weights.manifest import LocalPart, ShardReport

if TYPE_CHECKING:
    from rlhf_cluster.sections.training import Learner


class RunSection(Protocol):
    """Part of `[run]` that a rank reads."""

    @property
    def seed(self) -> int: ...

    @property
    def start_timeout_s(self) -> float: ...


class TrainingConfig(Protocol):
    """Part of a configuration, of reinforcement learning or of a stage, that a rank reads."""

    @property
    def run(self) -> RunSection: ...

    @property
    def learner(self) -> Learner: ...

    @property
    def tokens_per_row(self) -> int: ...


C = TypeVar("C", bound=TrainingConfig)


def warm(settings: Learner, model_dir: str | Path) -> None:
    """Import the modules that a rank with `settings` uses, and the code of the model's class.

    Imports are most of a rank's start. No weights are read, no device is used and no group is joined,
    so a warm process needs only host memory.
    """
    importlib.import_module("rlhf_cluster.learner.learner_rank")
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(model_dir, trust_remote_code=False)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    if settings.lora is not None:
        importlib.import_module("peft")
    if settings.backend == "zero3":
        import_deepspeed(torch.device("cuda" if settings.num_gpus else "cpu"))


class TrainingRank(Generic[C]):
    """Rank `rank` of `world_size`. All ranks meet at `init_method`, see `process_group.join_group`."""

    def __init__(
        self, config: C, model_dir: str, rank: int, world_size: int, init_method: str | None
    ) -> None:
        self._config = config
        self._model_dir = model_dir
        self._rank, self._world_size = rank, world_size
        self._init_method, self._made_s = init_method, time.monotonic()
        self._device = torch.device("cpu")
        self._joined = False
        self._model: ShardedModel | None = None
        self._outline: PolicyLM | None = None  # whose layers get adapters when they are sharded
        self._copies = StateCopies(rank)
        self._version = 0

    @property
    def version(self) -> int:
        """Number of steps that were taken."""
        return self._version

    @property
    def model(self) -> ShardedModel:
        if self._model is None:
            raise RunError(f"learner rank {self._rank} is not set up; call setup first")
        return self._model

    @property
    def policy(self) -> PolicyLM:
        return cast(PolicyLM, self.model.module)

    def copy_state(self) -> LearnerState:
        """Copy all state that training resumes from; see `rank_checkpoint.StateCopies`."""
        return self._copies.copy(self._updaters, self._stateful, self._version, self._further)

    def write_state(self, root: str) -> ShardReport:
        """Write the last copy of the state as this rank's shard. May run during a step."""
        return self._copies.write(root)

    def load_state(self, folder: str, state: LearnerState) -> None:
        """Load the state that `write_state` of all ranks wrote; see `rank_checkpoint.load`.

        Raises:
            RunError: a step was taken.
        """
        if self._updaters:
            raise RunError(f"load_state after version {self._version}: it comes before any step")
        self._begin()
        load(folder, state, self._updaters, self._stateful, self._further)
        self._version = state.version

    def close(self) -> None:
        """Leave the group and drop the model. Safe to call twice."""
        self._drop()
        if self._joined and dist.is_initialized():
            dist.destroy_process_group()
        self._joined = False

    @property
    def _updaters(self) -> dict[str, Updater]:
        """Updaters whose state is saved, by model; {} before the first step."""
        raise NotImplementedError

    @property
    def _stateful(self) -> Stateful:
        """Object whose numbers are saved too."""
        raise NotImplementedError

    @property
    def _further(self) -> Iterable[LocalPart]:
        """Other tensors to save, named as in `learner.rank_checkpoint`: views into live memory."""
        return ()

    def _begin(self) -> Updater:
        """Return the updater of the steps that are saved; the first call builds it."""
        raise NotImplementedError

    def _drop(self) -> None:
        """Close and drop all models."""
        self._close_models([] if self._model is None else [self._model])
        self._model = None

    def _close_models(self, models: list[ShardedModel]) -> None:
        for model in models:
            model.close()
        if models and self._config.learner.backend == "zero3":
            leave_group()

    def _use_device(self) -> None:
        if self._config.learner.num_gpus:
            self._device = torch.device("cuda", self._rank % torch.cuda.device_count())
            torch.cuda.set_device(self._device)
            limit_memory(self._config.learner.num_gpus, self._device)
        else:
            torch.set_num_threads(1)

    @property
    def _compute(self) -> torch.dtype:
        """Type in which passes compute."""
        return torch.bfloat16 if self._config.learner.dtype == "bfloat16" else torch.float32

    def _load_policy(self) -> PolicyLM:
        """Load the model of the folder, with adapters if configured. Raises `ConfigError`.

        Where FSDP2 shards the weights themselves, `_shard` reads them.
        """
        settings = self._config.learner
        kind = torch.float32, self._device, True, self._compute, settings.head_dtype
        policy = outline_policy(self._model_dir, *kind) if settings.backend == "fsdp2" else None
        if policy is not None:
            check_names(policy, self._model_dir)
            if settings.lora is not None:
                self._outline = policy
                trial = outline_policy(self._model_dir, *kind)
                add_adapters(cast(PolicyLM, trial), settings.lora, self._config.run.seed)
            return policy
        policy = load_policy(self._model_dir, *kind)
        check_names(policy, self._model_dir)
        if settings.lora is not None:
            add_adapters(policy, settings.lora, self._config.run.seed)
            check_distribution(policy, self._compute)
        return policy

    def _join(self) -> DeviceMesh:
        """Join the process group of all ranks.

        Raises: `StalledError`.
        Waits for: the other ranks, until `run.start_timeout_s` after this rank was built.
        """
        whole_s = callee_deadline(self._config.run.start_timeout_s)
        left_s = max(1.0, whole_s - (time.monotonic() - self._made_s))
        mesh = join_group(
            self._init_method,
            self._rank,
            self._world_size,
            self._device.type,
            left_s,
            self._config.learner.collective_timeout_s,
        )
        self._joined = True
        return mesh

    def _shard(self, model: PolicyLM | ValueLM, mesh: DeviceMesh) -> ShardedModel:
        settings, compute = self._config.learner, self._compute
        if settings.backend == "zero3":
            if settings.gradient_checkpointing:
                cast(Any, model.lm).gradient_checkpointing_enable({"use_reentrant": False})
            timeout_s = settings.collective_timeout_s
            return partition(model, self._adamw, self._device, compute, timeout_s)
        with self._preparing() as prepare:
            how = mesh, compute, settings.gradient_checkpointing, prepare
            if isinstance(model, ValueLM):
                shard_value_model(model, *how)
            else:
                shard(model, *how)
        load_shards(model, self._model_dir, self._device, compute, self._rank)
        return Fsdp2Model(model, self._adamw)

    def _preparing(self) -> AbstractContextManager[Callable[[nn.Module], None] | None]:
        """Return the context of what is done to each layer before it is sharded, if anything is."""
        outline, self._outline = self._outline, None
        if outline is None:
            return nullcontext()
        lora = cast(Any, self._config.learner.lora)
        return adapting(outline, lora, self._config.run.seed, self._device, self._model_dir)

    def _facts(self) -> dict[str, Any]:
        module: Any = self.model.module
        weights = (stands_for(module, part) for part in self.model.shards())
        sizes = {name: math.prod(shape) for name, shape in weights}
        return {
            "rank": self._rank,
            "world_size": self._world_size,
            "device": str(self._device),
            "attention": module.config._attn_implementation,
            "num_parameters": sum(sizes.values()),
            "num_trained_parameters": sum(
                sizes[name] for name, p in module.named_parameters() if p.requires_grad
            ),
        }

    def _new_updater(self, schedule: Schedule) -> Updater:
        return Updater(self.model, schedule, self._config.learner.max_grad_norm)

    @property
    def _adamw(self) -> AdamWSettings:
        settings = self._config.learner
        return AdamWSettings(
            beta1=settings.beta1,
            beta2=settings.beta2,
            eps=settings.adam_eps,
            weight_decay=settings.weight_decay,
        )

    def _schedule_over(self, num_updates: int) -> Schedule:
        """Return the learning-rate schedule of `[learner]` for `num_updates` optimizer steps."""
        settings = self._config.learner
        return Schedule(
            peak=settings.learning_rate,
            kind=settings.schedule,
            warmup_steps=settings.warmup_steps,
            total_steps=num_updates,
            minimum=settings.min_learning_rate,
            decay_steps=settings.decay_steps or 0,
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
