"""Reference policies held by a learner rank, for the KL over the whole vocabulary.

    hidden states of the reference, and its output projection -> chunks of logits (`models.logprobs`)

- `FrozenCopy`: the policy at the start of reinforcement learning. A second, frozen model, sharded
  by FSDP2 like the policy and in the type of the passes, so each rank holds its share.
- `StartAdapters`: the policy itself with the adapters of the start, which are swapped in for the
  reference's pass. The weights below the adapters never change, so this needs a second set of
  adapters, but no second model.
- `FollowingCopy`: a copy that follows the policy, TR-DPO (Gorbatovski et al. 2024, arXiv
  2404.09656):

    soft   reference <- (1 - share) reference + share policy, weight by weight
    hard   share = 1: reference <- policy, bitwise identical

Promises:
- a reference is held only if the algorithm asks for it; it gets no gradient and is not published;
- a policy equal to its reference has a KL of exactly 0; every rank makes the same passes;
- weights of a copy that follows are float32 whatever type the passes compute in, so small moves
  are not rounded away. A checkpoint stores nothing of it but its shards.

Shapes: B rows, S positions, H hidden size, V vocabulary, T response tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.sharding.fsdp2 import shard, shards_of
from rlhf_cluster.learner.sharding.sharded_loading import load_shards
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.learner.step.passes import (
    Layout,
    Reference,
    on_every_rank,
    score,
)
from rlhf_cluster.learner.step.training_batch import temperature_of
from rlhf_cluster.models.policy_model import (
    LogprobHead,
    load_policy,
    outline_policy,
)
from rlhf_cluster.records import ExperienceGroup
from rlhf_cluster.sections.values import HeadDtype
from rlhf_cluster.weights.manifest import LocalPart


class FrozenCopy:
    """`Reference` that loads the model of a folder a second time."""

    def __init__(
        self,
        model_dir: str | Path,
        mesh: DeviceMesh,
        device: torch.device,
        compute_dtype: torch.dtype,
        vocabulary: int | None = None,
        dtype: torch.dtype | None = None,
        head_dtype: HeadDtype = "float32",
    ) -> None:
        """Load and shard the model.

        Args:
            dtype: type of the weights, by default that of the passes.
            vocabulary: size of the policy's vocabulary, if this model's may differ. If this model has
                more entries, the last ones are padding and are not used.
        Raises: `ConfigError` like `policy_model.load_policy`, and for a smaller vocabulary.
        """
        kind = dtype or compute_dtype, device, False, compute_dtype, head_dtype
        policy = outline_policy(model_dir, *kind) or load_policy(model_dir, *kind)
        found = policy.config.get_text_config().vocab_size
        self._vocabulary = found if vocabulary is None else vocabulary
        if found < self._vocabulary:
            raise ConfigError(
                f"{model_dir}: has {found} logits, the model that is compared with it "
                f"{self._vocabulary}: the last ones would have no probability. Use a model with as "
                "many, or resize its embedding"
            )
        self._policy = shard(policy, mesh, compute_dtype, gradient_checkpointing=False)
        load_shards(self._policy, model_dir, device, compute_dtype, mesh.get_rank())

    @torch.no_grad()
    def outputs(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        hidden = self._policy(input_ids, position_ids)
        # the root's parameters stay gathered after a pass
        head = cast(LogprobHead, self._policy.lm.get_output_embeddings())
        return hidden, head.weight[: self._vocabulary]

    def release(self) -> None:
        cast(FSDPModule, self._policy).reshard()

    @contextmanager
    def as_policy(self) -> Iterator[Any]:
        yield self._policy
        self.release()


class StartAdapters:
    """`Reference` that is the policy with the adapters that it has when this is built."""

    def __init__(self, model: ShardedModel) -> None:
        self._model = model
        self._start = self._copies()

    @torch.no_grad()
    def outputs(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        with self.as_policy() as model:
            return model(input_ids, position_ids), None

    @contextmanager
    def as_policy(self) -> Iterator[Any]:
        self.release()
        current = self._copies()
        self._model.assign(self._start)
        try:
            yield self._model
        finally:
            self.release()
            self._model.assign(current)

    def release(self) -> None:
        # a pass without a backward pass leaves the root's parameters gathered
        cast(FSDPModule, self._model.module).reshard()

    def _copies(self) -> list[LocalPart]:
        trained = {n for n, p in self._model.module.named_parameters() if p.requires_grad}
        return [
            replace(part, tensor=part.tensor.clone())
            for part in self._model.shards()
            if part.name in trained
        ]


def with_reference_kl(
    policy: ShardedModel, reference: Reference, groups: Sequence[ExperienceGroup], layout: Layout
) -> list[ExperienceGroup]:
    """Return the groups with `reference_kl`, the KL of the current policy; equal on every rank."""
    rollouts = [s.rollout for g in groups for s in g.scored]
    sequences = [
        TokenSequence(prompt_ids=r.prompt_ids, target_ids=r.response_ids) for r in rollouts
    ]
    own = score(policy, sequences, temperature_of(rollouts), layout, reference)
    values = iter(on_every_rank(own, [len(r.response_ids) for r in rollouts], layout))
    return [
        replace(group, scored=tuple(replace(s, reference_kl=next(values)) for s in group.scored))
        for group in groups
    ]


class FollowingCopy(FrozenCopy):
    """`Reference` that loads the model of a folder a second time, and is moved by `follow`."""

    def __init__(
        self,
        model_dir: str | Path,
        mesh: DeviceMesh,
        device: torch.device,
        compute_dtype: torch.dtype,
        head_dtype: HeadDtype = "float32",
    ) -> None:
        """Load and shard the model. Raises `ConfigError` like `policy_model.load_policy`."""
        super().__init__(
            model_dir, mesh, device, compute_dtype, dtype=torch.float32, head_dtype=head_dtype
        )

    def shards(self) -> Iterator[LocalPart]:
        """Yield this rank's shard of every weight as flat views, with names of the policy."""
        return shards_of(self._policy)

    @torch.no_grad()
    def follow(self, policy: ShardedModel, share: float) -> None:
        """Set each weight to (1 - share) of itself plus `share`, in (0, 1], of the policy's.

        The policy is sharded by FSDP2 over the same ranks, and has no adapters.
        """
        own = {part.name: part.tensor for part in self.shards()}
        for part in policy.shards():
            if share == 1:
                own[part.name].copy_(part.tensor)
            else:
                own[part.name].mul_(1 - share).add_(part.tensor, alpha=share)
