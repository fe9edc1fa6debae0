"""Supervised fine-tuning: mean negative log-likelihood of target tokens, prompts not trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.data.examples import SftExample
from rlhf_cluster.learning.packing import TokenSequence
from rlhf_cluster.learning.passes import Layout, run_passes
from rlhf_cluster.learning.policy import PolicyLM
from rlhf_cluster.learning.update import Updater


def sft_step(
    policy: PolicyLM,
    updater: Updater,
    examples: Sequence[SftExample],
    step: int,
    layout: Layout,
) -> dict[str, float]:
    """One optimizer step on all examples (the same on every rank).

    Returns:
        `sft/loss` in nats a target token, `sft/entropy`, `sft/tokens`, `sft/grad_norm`,
        `sft/learning_rate`, `sft/skipped_steps`.
    """
    sequences = [TokenSequence(prompt_ids=e.prompt_ids, target_ids=e.target_ids) for e in examples]
    num_tokens = sum(len(e.target_ids) for e in examples)
    sums = run_passes(policy, sequences, (), num_tokens, 1.0, layout, _negative_log_likelihood)
    metrics = sums.reduce()
    metrics["sft/tokens"] = float(num_tokens)
    return {**metrics, **updater.apply(step, area="sft")}


def _negative_log_likelihood(
    logprobs: Tensor, entropy: Tensor, streams: Mapping[str, Tensor]
) -> tuple[Tensor, Sums]:
    loss = -logprobs.sum()
    count = loss.new_tensor(logprobs.numel())
    return loss, {"sft/loss": (loss, count), "sft/entropy": (entropy.sum(), count)}
