"""Step of supervised fine-tuning: mean negative log-likelihood of target tokens, not of prompts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.micro_batch_loss import TrainedTokens
from rlhf_cluster.data.packing import TokenSequence
from rlhf_cluster.data.prompts import SftExample
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.learner.step.metric_sums import MetricSums
from rlhf_cluster.learner.step.optimizer_step import Updater
from rlhf_cluster.learner.step.passes import (
    Layout,
    run_passes,
)


def sft_step(
    policy: ShardedModel,
    updater: Updater,
    examples: Sequence[SftExample],
    step: int,
    layout: Layout,
) -> dict[str, float]:
    """Run one optimizer step on all examples (the same on every rank).

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
