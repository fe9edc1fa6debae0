"""Forward and backward passes of one optimizer step, for any loss that is a sum over tokens.

Promises: gradients end up as those of `sum of all token losses of all ranks / num_tokens`,
whatever the number of ranks and micro-batches and the batching. Every rank makes the same number
of passes: a dummy goes through the model and the loss with no token, so its gradient is zero and
its collectives match those of the others.

Shapes: N trained tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.learning.metrics import MetricSums
from rlhf_cluster.learning.packing import Batching, MicroBatch, TokenSequence, collate, plan
from rlhf_cluster.learning.policy import PolicyLM


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How one rank lays its share of a batch into passes."""

    rank: int
    ranks: int
    device: torch.device
    batching: Batching
    tokens_per_micro_batch: int
    tokens_per_row: int
    logprob_chunk_tokens: int


class TokenLoss(Protocol):
    def __call__(
        self, logprobs: Tensor, entropy: Tensor, streams: Mapping[str, Tensor]
    ) -> tuple[Tensor, Sums]:
        """Loss sum and metric sums of N >= 0 trained tokens; every argument is [N] float32."""
        ...


def run_passes(
    policy: PolicyLM,
    sequences: Sequence[TokenSequence],
    streams: Sequence[str],
    num_tokens: int,
    temperature: float,
    layout: Layout,
    loss: TokenLoss,
) -> MetricSums:
    """Accumulate this rank's share of the gradient; returns its metric sums, not yet reduced.

    Args:
        sequences: of ALL ranks, the same on each; the plan picks this rank's.
        streams: names of the sequences' streams that `loss` receives.
        num_tokens: what the loss sum of all ranks is divided by.
        temperature: of the distribution that is scored.
    """
    lengths = [s.num_inputs for s in sequences]
    plans = plan(
        lengths,
        layout.ranks,
        layout.tokens_per_micro_batch,
        layout.tokens_per_row,
        layout.batching,
    )
    # the sharded policy averages gradients over ranks; times `ranks` makes it their sum
    scale = layout.ranks / num_tokens
    sums = MetricSums()
    for planned in plans[layout.rank]:
        batch = collate(planned, sequences, streams)
        logprobs, entropy, values = _trained_tokens(policy, batch, temperature, layout)
        loss_sum, metrics = loss(logprobs, entropy, values)
        (loss_sum * scale).backward()
        sums.add(metrics)
    return sums


def _trained_tokens(
    policy: PolicyLM, batch: MicroBatch, temperature: float, layout: Layout
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(layout.device, non_blocking=True)

    logprobs, entropy = policy(
        on_device(batch.input_ids),
        on_device(batch.position_ids),
        on_device(batch.labels),
        temperature=temperature,
        chunk_tokens=layout.logprob_chunk_tokens,
    )
    mask = on_device(batch.mask)
    streams = {name: on_device(values)[mask] for name, values in batch.streams.items()}
    return logprobs[mask], entropy[mask], streams
