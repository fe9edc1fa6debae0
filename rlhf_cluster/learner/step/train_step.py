"""Training steps of the policy: a batch of any RL algorithm, or of supervised warm-up (`sft_step`).

A step of an RL algorithm is a batch, its minibatches and optimizer steps:

    staleness gate -> [values, KL] -> advantages -> sequences -> [proximal log-probabilities]
        -> for each epoch and minibatch: passes -> clip -> optimizer step [critic likewise]
        -> metrics reduced

Every rank gets ALL groups of the step and computes its share by the same plan. The only
communication is that of the sharded models, one reduction of metric sums, the gradient norms, one
sum of the tokens that are recorded for the samples, and one of values (with a critic) or of KLs
(in the reward).

Minibatches consist of units, which are rollouts, or complete groups for an algorithm that compares
the rollouts of a group.

Promises:
- a batch that exceeds the staleness bound raises before a weight changes;
- the weight of a token in the loss is computed from all rollouts of its optimizer step
  (`algorithms.policy_losses`), including rollouts that are skipped because their loss is zero,
  times the weight of its group;
- metrics of tokens are over the tokens that were computed;
- with one optimizer step per batch the current policy is the proximal one, and needs no separate pass.
  With more, its log-probabilities are computed before the first of them;
- minibatches depend on the seed, the batch's number and its size only, so every rank has the same
  ones, whatever the number of ranks. In each epoch every unit is in exactly one minibatch, and their
  sizes differ by at most one unit. Members stay the same over epochs, and only the order changes. So
  each rank sees the same sequences again, and can reuse their computed values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Algorithm, LossInputs, Sums
from rlhf_cluster.algorithms.micro_batch_loss import TrainedTokens
from rlhf_cluster.algorithms.off_policy_distance import derive_effects, effect_sums
from rlhf_cluster.algorithms.policy_losses import token_weights
from rlhf_cluster.config.run_config import RunConfig
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.learner.learner_reference import Reference, with_reference_kl
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.learner.step.critic import STREAMS, Critic, HeadCritic, attach, value_metrics
from rlhf_cluster.learner.step.optimizer_step import Updater
from rlhf_cluster.learner.step.passes import Layout, MetricSums, on_every_rank, run_passes, score
from rlhf_cluster.learner.step.training_batch import TrainingBatch, check_staleness, training_batch
from rlhf_cluster.learner.token_samples import COLUMNS, KeptTokens
from rlhf_cluster.records import ExperienceGroup


def minibatches(num_units: int, count: int, seed: int, number: int) -> list[list[int]]:
    """Split units 0 .. num_units - 1 into `count` random minibatches, each in rising order."""
    if count == 1:
        return [list(range(num_units))]
    shuffled = np.random.default_rng((seed, number)).permutation(num_units)
    return [sorted(int(i) for i in part) for part in np.array_split(shuffled, count)]


def order_of_parts(count: int, epochs: int, seed: int, number: int) -> list[int]:
    """Return the minibatches in training order, each once per epoch: [count * epochs]."""
    if count == 1:
        return [0] * epochs
    # The 1 makes another stream than that of `minibatches`, which has the same seed and number.
    random = np.random.default_rng((seed, number, 1))
    return [int(i) for _ in range(epochs) for i in random.permutation(count)]


Clock = Callable[[], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """Settings of the run that a step needs."""

    max_staleness: int
    max_response_tokens: int
    epochs: int
    minibatches: int
    seed: int

    @classmethod
    def of(cls, config: RunConfig) -> StepSettings:
        return cls(
            max_staleness=config.staleness.bound,
            max_response_tokens=config.generation.max_response_tokens,
            epochs=config.learner.epochs,
            minibatches=config.learner.minibatches,
            seed=config.run.seed,
        )

    @property
    def num_updates(self) -> int:
        """Number of optimizer steps of one batch."""
        return self.epochs * self.minibatches


def train_step(
    policy: ShardedModel,
    updater: Updater,
    algorithm: Algorithm,
    groups: Sequence[ExperienceGroup],
    version: int,
    settings: StepSettings,
    layout: Layout,
    clock: Clock,
    kept: KeptTokens,
    report_skipped: Callable[[int, list[str]], None] = lambda update, rollout_ids: None,
    critic: Critic | None = None,
    reference: Reference | None = None,
) -> dict[str, float]:
    """Train on `groups`; the learner's version before the step is `version`.

    Args:
        report_skipped: called with the number and the rollout ids of each skipped optimizer step.
        kept: records every pass; its `found` is set at the end.
    Returns:
        Metrics. They are the same on every rank, apart from the seconds of the phases
        (`learner/prepare_s`, `learner/forward_backward_s`, `learner/optimizer_s`).
    Raises:
        StalenessError: a trained token exceeds the bound. No weight has changed.
        RecordError: the groups cannot be trained on.
        DivergenceError: gradients were not finite in several consecutive optimizer steps.
    """
    started = clock()
    metrics = check_staleness(groups, version, settings.max_staleness)
    groups = algorithm.trained_groups(groups)
    groups = _add_reference_kl(policy, algorithm, reference, groups, layout)
    batch, estimated = _build_batch(algorithm, critic, groups, version, layout)
    metrics |= estimated
    parts = _parts(policy, algorithm, batch, version, settings, layout)
    prepared = clock()
    sums, optimizer_s, norms = MetricSums(), 0.0, dict[str, list[float]]()
    order = order_of_parts(len(parts), settings.epochs, settings.seed, version)
    for update, index in enumerate(order, start=version * settings.num_updates):
        _backward(policy, algorithm, parts[index], batch, layout, sums, critic, reference, kept)
        if critic is not None:
            critic.backward(parts[index].sequences, layout, sums)
        computed = clock()
        skipped_before = updater.num_skipped
        applied = updater.apply(update) | (critic.apply(update) if critic is not None else {})
        for name in (n for n in applied if "grad_norm" in n):
            norms.setdefault(name, []).append(applied[name])
        metrics |= applied
        optimizer_s += clock() - computed
        if updater.num_skipped > skipped_before:
            report_skipped(update, [batch.rollout_ids[i] for i in parts[index].members])
    metrics |= _reduce_metrics(algorithm, sums, batch, settings)
    metrics |= {name: float(np.mean(values)) for name, values in norms.items()}
    metrics |= {
        "learner/prepare_s": prepared - started,
        "learner/forward_backward_s": clock() - prepared - optimizer_s,
        "learner/optimizer_s": optimizer_s,
    }
    kept.join(groups, lambda own, n: on_every_rank(own, n, layout, width=(COLUMNS,)))
    algorithm.finish_step(metrics)
    return metrics


def _add_reference_kl(
    policy: ShardedModel,
    algorithm: Algorithm,
    reference: Reference | None,
    groups: Sequence[ExperienceGroup],
    layout: Layout,
) -> Sequence[ExperienceGroup]:
    """Return the groups with their KL to the reference, if it is part of the reward."""
    if reference is None or algorithm.full_kl_in != "reward":
        return groups
    return with_reference_kl(policy, reference, groups, layout)


def _build_batch(
    algorithm: Algorithm,
    critic: Critic | None,
    groups: Sequence[ExperienceGroup],
    version: int,
    layout: Layout,
) -> tuple[TrainingBatch, dict[str, float]]:
    """Build the training batch from the groups.

    With a critic, its value estimates are used for the advantages, and its value metrics are returned.
    """
    drop = algorithm.zero_advantage_is_zero_loss
    if critic is None:
        return training_batch(groups, algorithm.advantages(groups), version, drop), {}
    advantages, values, returns = critic.estimate(groups, layout)
    batch = attach(training_batch(groups, advantages, version, drop), values, returns)
    return batch, value_metrics(groups, values, returns)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Minibatch: the rollouts of one optimizer step, and the sequences that are computed for it."""

    members: list[int]
    sequences: list[TokenSequence]
    computed: list[int]  # [sequences] rollout of each sequence
    unit_sizes: list[int]  # number of sequences in each unit


def _parts(
    policy: ShardedModel,
    algorithm: Algorithm,
    batch: TrainingBatch,
    version: int,
    settings: StepSettings,
    layout: Layout,
) -> list[_Part]:
    """Split the batch into minibatches with token weights, and proximal log-probabilities if used."""
    parts, units = [], _units(batch, algorithm.keeps_groups)
    for picked in minibatches(len(units), settings.minibatches, settings.seed, version):
        members = [i for number in picked for i in units[number]]
        present = [sum(batch.sequences[i] is not None for i in units[n]) for n in picked]
        unit_sizes = [size for size in present if size]
        computed = [i for i in members if batch.sequences[i] is not None]
        weights = token_weights(
            [batch.num_tokens[i] for i in members],
            algorithm.aggregation,
            settings.max_response_tokens,
        )
        sequences = [
            _with_stream(
                sequence, "weight", np.full(len(sequence.target_ids), weight * batch.weights[i])
            )
            for i, weight in zip(members, weights, strict=True)
            if (sequence := batch.sequences[i]) is not None
        ]
        if settings.num_updates > 1 and algorithm.needs_proximal:
            found = score(policy, sequences, batch.temperature, layout, unit_sizes=unit_sizes)
            for i, values in found.items():
                sequences[i] = _with_stream(sequences[i], "proximal_logprobs", values)
        parts.append(
            _Part(members=members, sequences=sequences, computed=computed, unit_sizes=unit_sizes)
        )
    return parts


def _units(batch: TrainingBatch, whole_groups: bool) -> list[range]:
    """Return the units of the batch: the rollouts of each group, or each rollout alone."""
    sizes = batch.group_sizes if whole_groups else [1] * len(batch.sequences)
    ends = np.cumsum(sizes).tolist()
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def _with_stream(sequence: TokenSequence, name: str, values: np.ndarray) -> TokenSequence:
    return replace(sequence, streams={**sequence.streams, name: values.astype(np.float32)})


def _backward(
    policy: ShardedModel,
    algorithm: Algorithm,
    part: _Part,
    batch: TrainingBatch,
    layout: Layout,
    sums: MetricSums,
    critic: Critic | None,
    reference: Reference | None,
    kept: KeptTokens,
) -> None:
    head = critic if isinstance(critic, HeadCritic) else None

    def loss(tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        streams = tokens.streams
        proximal = streams.get("proximal_logprobs", tokens.logprobs.detach())
        inputs = LossInputs(
            learner_logprobs=tokens.logprobs,
            proximal_logprobs=proximal,
            sampled_logprobs=streams["sampled_logprobs"],
            ref_logprobs=streams.get("ref_logprobs"),
            advantages=streams["advantages"],
            entropy=tokens.entropy,
            staleness=streams["staleness"],
            sequence=tokens.sequence,
            num_sequences=tokens.num_sequences,
            unit_sizes=tokens.unit_sizes,
            teacher_logprobs=streams.get("teacher_logprobs"),
            exact_logprobs=streams.get("exact_logprobs"),
            reference_kl=streams.get("reference_kl", tokens.kl),
        )
        losses, metrics = algorithm.loss(inputs)
        kept.see([part.computed[member] for member in tokens.members], inputs, algorithm)
        total = (losses * streams["weight"]).sum()
        count = total.new_tensor(losses.numel())
        own = {"learner/loss": (total, count), "learner/entropy": (tokens.entropy.sum(), count)}
        if inputs.exact_logprobs is not None:
            own |= effect_sums(inputs.sampled_logprobs, proximal, inputs.exact_logprobs)
        if head is not None:
            value_loss, of_values = head.loss(tokens)
            total, own = total + value_loss, own | dict(of_values)
        return total, {**metrics, **own}

    # `_parts` scored this rank's sequences only, so the others lack the stream.
    scored = any("proximal_logprobs" in s.streams for s in part.sequences)
    names = (*batch.streams, "weight", *(["proximal_logprobs"] if scored else []))
    names = names if head is None else (*names, *STREAMS)
    run_passes(
        policy,
        part.sequences,
        names,
        batch.temperature,
        layout,
        loss,
        sums,
        algorithm.trains_entropy,
        with_hidden=head is not None,
        reference=reference if algorithm.full_kl_in == "loss" else None,
        unit_sizes=part.unit_sizes,
    )


def _reduce_metrics(
    algorithm: Algorithm, sums: MetricSums, batch: TrainingBatch, settings: StepSettings
) -> dict[str, float]:
    reduced = sums.reduce()
    means = dict(algorithm.derive(reduced)) | derive_effects(reduced)
    # convert the mean over tokens of their loss shares to the mean loss of an optimizer step
    computed = sum(
        n for n, s in zip(batch.num_tokens, batch.sequences, strict=True) if s is not None
    )
    share = computed / settings.minibatches
    return means | {
        "learner/loss": means.get("learner/loss", 0.0) * share,
        "learner/tokens": float(sum(batch.num_tokens)),
        "learner/rollouts": float(len(batch.rollout_ids)),
        "learner/dropped_rollouts": float(batch.num_left_out),
    }


def sft_step(
    policy: ShardedModel,
    updater: Updater,
    examples: Sequence[SftExample],
    step: int,
    layout: Layout,
) -> dict[str, float]:
    """Run one supervised optimizer step on all examples (the same on every rank).

    The loss is the mean negative log-likelihood of target tokens, not of prompts.

    Returns:
        `sft/loss` in nats per target token, `sft/entropy`, `sft/tokens`, `sft/grad_norm`,
        `sft/learning_rate`, `sft/skipped_steps`.
    """
    sequences = [TokenSequence(prompt_ids=e.prompt_ids, target_ids=e.target_ids) for e in examples]
    num_tokens = sum(len(e.target_ids) for e in examples)

    def loss(tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        total = -tokens.logprobs.sum()
        count = total.new_tensor(tokens.logprobs.numel())
        sums = {"sft/loss": (total, count), "sft/entropy": (tokens.entropy.sum(), count)}
        return total / num_tokens, sums

    sums = MetricSums()
    run_passes(policy, sequences, (), 1.0, layout, loss, sums)
    metrics = sums.reduce()
    metrics["sft/tokens"] = float(num_tokens)
    return {**metrics, **updater.apply(step, area="sft")}
