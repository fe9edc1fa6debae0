"""Critics: a separate value model, or a value head on the policy's trunk.

    `Critic`       values[t] = value_head(decoder(prompt, response[:t]))     before token t is sampled
    `HeadCritic`   values[t] = value_head(last hidden state of the policy at (prompt, response[:t]))
                   loss of an optimizer step = policy loss + critic.coef * value loss

The decoder of `Critic` has the policy's architecture. It is a separate sharded model that starts
equal to the policy at the start of reinforcement learning, and has a separate optimizer.
`HeadCritic` needs one pass for log-probabilities and values.

Promises of both:
- heads start at 0, so the first values are exactly 0 (and the trunk's first value gradient too);
- the values of all rollouts of a step are known on every rank before anything is estimated from
  them, so statistics over the step (whitening, explained variance) equal those of one rank;
- the value of a token depends on the tokens before it only;
- the gradient of the value loss is that of its weighted sum over the tokens of the optimizer step,
  with the policy's weights, whatever the number of ranks, the micro-batches and the packing;
- the head and its output are float32 also if the decoder's passes are bfloat16.

Gradients: `Critic` sends none to the policy. With `HeadCritic` the trunk receives both, clipped
together with the policy's. Its head has an optimizer, a learning rate and a clip from `[critic]`,
which see the gradient of the value loss times `critic.coef`. The head is a sharded module next to
the policy, not part of it, so it is never published. Its passes run inside the policy's backward
pass. FSDP2 allows that; a DeepSpeed engine, which runs only its module's backward pass, does not.

Shapes: B rows, S positions, H hidden size, T response tokens of one rollout, N trained tokens of a
micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from rlhf_cluster.algorithms.algorithm import CriticAlgorithm, PerToken, Sums, ValueInputs
from rlhf_cluster.algorithms.micro_batch_loss import TrainedTokens, TrainedValues
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.errors import ConfigError, RunError
from rlhf_cluster.learner.sharding.fsdp2 import shard
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.learner.step import passes
from rlhf_cluster.learner.step.optimizer_step import Schedule, Updater
from rlhf_cluster.learner.step.passes import Layout, MetricSums, on_every_rank, run_value_passes
from rlhf_cluster.learner.step.training_batch import TrainingBatch
from rlhf_cluster.models.policy_model import (
    PolicyLM,
    check_training_mode,
    hidden_states,
    load_policy,
    outline_policy,
)
from rlhf_cluster.records import ExperienceGroup
from rlhf_cluster.sections.rl_run import Critic as CriticSection

_STREAMS = ("start_values", "returns", "weight")


class ValueHead(nn.Linear):
    """Linear head that computes in float32, whatever the types of input and weights. Starts at 0."""

    def __init__(
        self, hidden_size: int, device: torch.device, num_values: int = 1, bias: bool = True
    ) -> None:
        super().__init__(hidden_size, num_values, bias=bias, device=device)
        nn.init.zeros_(self.weight)
        if bias:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.float()
        return nn.functional.linear(input.float(), self.weight.float(), bias)


class ValueLM(nn.Module):
    """Decoder of the policy with a head of values; the root module for sharding."""

    def __init__(self, policy: PolicyLM, num_values: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.lm = policy.lm.base_model
        self.config = policy.config
        self.num_values = num_values
        device = next(self.lm.parameters()).device
        hidden_size = self.config.get_text_config().hidden_size
        # An outlined decoder has no device yet; sharding moves the head to that of its mesh.
        device = torch.device("cpu") if device.type == "meta" else device
        self.value_head = ValueHead(hidden_size, device, num_values, bias)

    def forward(self, input_ids: Tensor, position_ids: Tensor, only_hidden: bool = False) -> Tensor:
        """Compute the value after each position, [B, S] float32; [B, S, num_values] if several.

        `input_ids` and `position_ids` are [B, S] int64. `only_hidden`: return the last hidden states
        [B, S, H] instead.
        """
        hidden = hidden_states(self.lm, input_ids, position_ids)
        if only_hidden:
            return hidden.clone()
        values = self.value_head(hidden.reshape(-1, hidden.shape[-1]))
        several = () if self.num_values == 1 else (self.num_values,)
        # FSDP hooks the outputs and warns of views
        return values.view(*input_ids.shape, *several).clone()


def load_value_model(
    model_dir: str | Path, device: torch.device, compute_dtype: torch.dtype, outlined: bool = False
) -> ValueLM:
    """Make a trainable value model of a causal LM's folder, with float32 weights.

    `outlined`: parameters stay on the meta device where they can, until `load_shards` reads them.

    Raises:
        ConfigError: like `policy_model.load_policy`, which checks that sequences can be packed.
    """
    kind = torch.float32, device, True, compute_dtype
    policy = outline_policy(model_dir, *kind) if outlined else None
    return ValueLM(policy or load_policy(model_dir, *kind))


@torch.no_grad()
def check_value_model(model: ValueLM, compute_dtype: torch.dtype) -> None:
    """Raise `ConfigError` if packed sequences see each other, or training mode changes hidden states.

    Every rank of a sharded model must take part. The head's values would show nothing: they start at 0.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(15, device=device) % vocabulary
    first, second = tokens[None, 3:8], tokens[None, 11:15]
    places = [torch.arange(s.shape[1], device=device)[None] for s in (first, second)]
    packed = model(torch.cat([first, second], 1), torch.cat(places, 1), only_hidden=True)
    alone = [model(s, p, only_hidden=True) for s, p in zip((first, second), places, strict=True)]
    expected = torch.cat(alone, 1)
    distance = ((packed - expected).abs().max() / expected.abs().max()).item()
    bound = 1e-3 if compute_dtype == torch.float32 else 0.05
    if not distance <= bound:
        raise ConfigError(
            f"{type(model.lm).__name__}: hidden states of packed sequences differ by {distance:.3g} of "
            f"the largest one, more than the bound {bound}. Its attention mixes packed sequences; use "
            "another model"
        )

    def hidden(row: Tensor, positions: Tensor) -> Tensor:
        found = model(row, positions, only_hidden=True).float()
        return found / found.abs().max()

    check_training_mode(model, compute_dtype, hidden)
    model.train(was_training)


def shard_value_model(
    model: ValueLM,
    mesh: DeviceMesh,
    compute_dtype: torch.dtype,
    gradient_checkpointing: bool,
    prepare: Callable[[nn.Module], None] | None = None,
) -> ValueLM:
    """Shard a value model in place like the policy; its head is separate and in float32."""
    fully_shard(model.value_head, mesh=mesh)
    return shard(model, mesh, compute_dtype, gradient_checkpointing, prepare)


def start_as(policy: ShardedModel, model: ShardedModel) -> None:
    """Copy this rank's shards of the policy's decoder into the critic's, which is sharded alike."""
    prefix = f"lm.{cast(PolicyLM, policy.module).lm.base_model_prefix}."
    model.assign(
        replace(part, name=f"lm.{part.name.removeprefix(prefix)}")
        for part in policy.shards()
        if part.name.startswith(prefix)
    )


class Critic:
    """Critic of one rank. Every rank makes the same calls with the same arguments."""

    def __init__(self, model: ShardedModel, updater: Updater, algorithm: CriticAlgorithm) -> None:
        self._model = model
        self.updater = updater
        self._algorithm = algorithm

    def estimate(
        self, groups: Sequence[ExperienceGroup], layout: Layout
    ) -> tuple[PerToken, PerToken, PerToken]:
        """Compute (advantages, values, returns) of all rollouts, the same on every rank."""
        values = score_values(self._model, groups, layout)
        advantages, returns = self._algorithm.estimate(groups, values)
        return advantages, values, returns

    def backward(
        self, sequences: Sequence[TokenSequence], layout: Layout, sums: MetricSums
    ) -> None:
        """Accumulate this rank's share of the value loss's gradient, and its metrics in `sums`.

        `sequences` are those of all ranks, with the streams that `attach` and the step added.
        """

        def loss(found: TrainedValues) -> tuple[Tensor, Sums]:
            streams = dict(found.streams)
            weight = streams.pop("weight")
            losses, metrics = self._algorithm.value_loss(
                ValueInputs(values=found.values, **streams)
            )
            count = losses.new_tensor(losses.numel())
            return (losses * weight).sum(), {**metrics, "critic/loss": (losses.sum(), count)}

        run_value_passes(self._model, sequences, _STREAMS, layout, loss, sums)

    def apply(self, update: int) -> dict[str, float]:
        """Run optimizer step `update` like `Updater.apply`, without the norms of parameter groups."""
        found = self.updater.apply(update, area="critic")
        return {name: value for name, value in found.items() if "_part/" not in name}


def attach(batch: TrainingBatch, values: PerToken, returns: PerToken) -> TrainingBatch:
    """Return the batch with the streams `start_values` and `returns` in its sequences."""
    flat = zip(
        batch.sequences,
        (v for group in values for v in group),
        (r for group in returns for r in group),
        strict=True,
    )
    sequences = [
        None
        if sequence is None
        else replace(sequence, streams={**sequence.streams, "start_values": v, "returns": r})
        for sequence, v, r in flat
    ]
    return replace(batch, sequences=sequences)


def value_metrics(
    groups: Sequence[ExperienceGroup], values: PerToken, returns: PerToken
) -> dict[str, float]:
    """Compute how well the values at the start of the step predicted the returns of trained tokens.

    `critic/explained_variance` is 1 - var(returns - values) / var(returns): 1 is perfect, 0 is not
    better than a constant. It is omitted if all returns are equal.
    """
    masks = [s.rollout.response_mask for g in groups for s in g.scored]
    value, target = (
        np.concatenate([a[m].astype(np.float64) for a, m in zip(_flat(arrays), masks, strict=True)])
        for arrays in (values, returns)
    )
    found = {"critic/value_mean": float(value.mean()), "critic/return_mean": float(target.mean())}
    if np.ptp(target) > 0:
        found["critic/explained_variance"] = float(1 - (target - value).var() / target.var())
    return found


def score_values(
    model: Callable[..., Tensor], groups: Sequence[ExperienceGroup], layout: Layout
) -> PerToken:
    """Compute the value before each response token, [T] float32 of every rollout, on every rank.

    Each rank computes its share, which has the values of different tokens. One collective adds the
    shares up.
    """
    rollouts = [s.rollout for g in groups for s in g.scored]
    sequences = [
        TokenSequence(prompt_ids=r.prompt_ids, target_ids=r.response_ids) for r in rollouts
    ]
    own = passes.score_values(model, sequences, layout)
    per_rollout = iter(on_every_rank(own, [len(r.response_ids) for r in rollouts], layout))
    return [[next(per_rollout) for _ in group.scored] for group in groups]


def _flat(arrays: PerToken) -> list[np.ndarray]:
    return [a for group in arrays for a in group]


STREAMS = ("start_values", "returns")
"""Streams that `HeadCritic.loss` needs in the policy's passes."""


def sharded_head(policy: PolicyLM, mesh: DeviceMesh) -> ValueHead:
    """Build a float32 head for this policy's hidden states, sharded over the ranks."""
    head = ValueHead(policy.config.get_text_config().hidden_size, next(policy.parameters()).device)
    fully_shard(head, mesh=mesh)
    return head


class HeadCritic(Critic):
    """`Critic` whose value loss is part of the policy's passes."""

    def __init__(
        self,
        policy: ShardedModel,
        head: ShardedModel,
        updater: Updater,
        algorithm: CriticAlgorithm,
        coef: float,
    ) -> None:
        super().__init__(head, updater, algorithm)
        self._policy = policy
        self._coef = coef

    def estimate(
        self, groups: Sequence[ExperienceGroup], layout: Layout
    ) -> tuple[PerToken, PerToken, PerToken]:
        """Compute (advantages, values, returns) of all rollouts, the same on every rank."""

        def values_of(input_ids: Tensor, position_ids: Tensor) -> Tensor:
            return self._model(self._policy(input_ids, position_ids)).squeeze(-1)

        values = score_values(values_of, groups, layout)
        advantages, returns = self._algorithm.estimate(groups, values)
        return advantages, values, returns

    def loss(self, tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        """Compute this micro-batch's share of the weighted value loss, a scalar, and metric sums."""
        if tokens.hidden is None:
            raise RunError("a value head needs the hidden states of the pass; ask for them")
        inputs = ValueInputs(
            values=self._model(tokens.hidden).squeeze(-1),
            start_values=tokens.streams["start_values"],
            returns=tokens.streams["returns"],
        )
        losses, metrics = self._algorithm.value_loss(inputs)
        count = losses.new_tensor(losses.numel())
        share = self._coef * (losses * tokens.streams["weight"]).sum()
        return share, {**metrics, "critic/loss": (losses.sum(), count)}

    def backward(
        self, sequences: Sequence[TokenSequence], layout: Layout, sums: MetricSums
    ) -> None:
        """Do nothing: the policy's passes have computed the gradient."""


def new_critic(
    settings: CriticSection, policy: ShardedModel, model: ShardedModel, algorithm: CriticAlgorithm
) -> Critic:
    """Build the critic of `model`, a head, or a value model that starts equal to the policy."""
    schedule = Schedule(peak=settings.learning_rate, warmup_steps=settings.warmup_steps)
    updater = Updater(model, schedule, settings.max_grad_norm)
    if settings.kind == "head":
        return HeadCritic(policy, model, updater, algorithm, settings.coef)
    start_as(policy, model)
    return Critic(model, updater, algorithm)
