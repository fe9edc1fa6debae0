"""Forward and backward passes of one optimizer step, for any loss that is a sum over tokens.

Promises: gradients end up as those of the sum of all micro-batches' losses of all ranks, whatever
the number of ranks and micro-batches and the batching. Every rank makes the same number of passes:
a dummy goes through the model and the loss with no token, so its gradient is zero and its
collectives match those of the others.

Shapes: N trained tokens of one micro-batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cluster.algorithms.base import Sums
from rlhf_cluster.learning.backend import ShardedModel
from rlhf_cluster.learning.metrics import MetricSums
from rlhf_cluster.learning.packing import (
    Batching,
    MicroBatch,
    MicroBatchPlan,
    TokenSequence,
    collate,
    plan,
)

if TYPE_CHECKING:
    from rlhf_cluster.learning.reference import Reference


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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens:
    """The trained tokens of one micro-batch; N may be 0."""

    logprobs: Tensor  # [N] float32, carries the gradient
    entropy: Tensor  # [N] float32
    streams: Mapping[str, Tensor]  # each [N] float32
    sequence: Tensor  # [N] int64 in [0, num_sequences)
    num_sequences: int
    kl: Tensor | None = None  # [N] float32, to the reference where there is one, with gradient
    hidden: Tensor | None = None  # [N, H] before each token, with gradient, where it was asked for


class TokenLoss(Protocol):
    def __call__(self, tokens: TrainedTokens) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the step's loss, a scalar, and metric sums."""
        ...


def run_passes(
    policy: ShardedModel,
    sequences: Sequence[TokenSequence],
    streams: Sequence[str],
    temperature: float,
    layout: Layout,
    loss: TokenLoss,
    sums: MetricSums,
    entropy_gradient: bool = False,
    with_hidden: bool = False,
    reference: Reference | None = None,
) -> None:
    """Accumulate this rank's share of the gradient, and its metrics in `sums`.

    Args:
        sequences: of ALL ranks, the same on each but for streams; the plan picks this rank's.
        streams: names of the sequences' streams that `loss` receives.
        temperature: of the distribution that is scored.
        loss: the shares of all micro-batches of all ranks add up to the loss that is descended.
        entropy_gradient: whether the loss needs the entropy's gradient.
        with_hidden: whether the loss needs the policy's last hidden states.
        reference: the policy whose KL the loss needs; its passes come on top.
    """
    for planned in own_plan(sequences, layout):
        batch = collate(planned, sequences, streams)
        logprobs, entropy, *more = _forward(
            policy, batch, temperature, layout, entropy_gradient, with_hidden, reference
        )
        mask = torch.from_numpy(batch.mask).to(layout.device, non_blocking=True)

        def trained(array: np.ndarray, mask: Tensor = mask) -> Tensor:
            return torch.from_numpy(array).to(layout.device, non_blocking=True)[mask]

        tokens = TrainedTokens(
            logprobs=logprobs[mask],
            entropy=entropy[mask],
            streams={name: trained(values) for name, values in batch.streams.items()},
            sequence=trained(batch.sequence),
            num_sequences=len(batch.spans),
            kl=more[0][mask] if reference is not None else None,
            hidden=more[-1][mask] if with_hidden else None,
        )
        share, metrics = loss(tokens)
        # the sharded policy averages gradients over ranks; times `ranks` makes it their sum
        policy.backward(share * layout.ranks)
        sums.add(metrics)
    if reference is not None:
        reference.release()


@torch.no_grad()
def score(
    policy: ShardedModel,
    sequences: Sequence[TokenSequence],
    temperature: float,
    layout: Layout,
    reference: Reference | None = None,
) -> dict[int, np.ndarray]:
    """Log-probabilities of the targets [T] float32, of those sequences that `run_passes` with the
    same sequences and layout would compute on this rank, by their index. With a reference the KL to
    it at each target instead."""
    found = {}
    for planned in own_plan(sequences, layout):
        batch = collate(planned, sequences)
        logprobs, _, *kl = _forward(
            policy, batch, temperature, layout, entropy_gradient=False, reference=reference
        )
        values = (kl[0] if kl else logprobs).float().cpu().numpy()
        for span in batch.spans:
            found[span.sequence] = values[span.row, span.start : span.stop].copy()
    if reference is not None:
        reference.release()
    return found


def on_every_rank(
    own: Mapping[int, np.ndarray], lengths: Sequence[int], layout: Layout
) -> list[np.ndarray]:
    """Values [T] float32 of all sequences, of which each is in one rank's `own` by its index.

    Waits for all ranks (one collective).
    """
    ends = np.cumsum(lengths)
    flat = np.zeros(ends[-1], dtype=np.float32)
    for index, values in own.items():
        flat[ends[index] - lengths[index] : ends[index]] = values
    shared = torch.from_numpy(flat).to(layout.device)
    dist.all_reduce(shared)
    return np.split(shared.cpu().numpy(), ends[:-1])


def own_plan(sequences: Sequence[TokenSequence], layout: Layout) -> list[MicroBatchPlan]:
    """This rank's micro-batches, as many as every other rank's."""
    plans = plan(
        [s.num_inputs for s in sequences],
        layout.ranks,
        layout.tokens_per_micro_batch,
        layout.tokens_per_row,
        layout.batching,
    )
    return plans[layout.rank]


def _forward(
    policy: ShardedModel,
    batch: MicroBatch,
    temperature: float,
    layout: Layout,
    entropy_gradient: bool,
    with_hidden: bool = False,
    reference: Reference | None = None,
) -> tuple[Tensor, ...]:
    arrays = (batch.input_ids, batch.position_ids, batch.labels)
    inputs = [torch.from_numpy(a).to(layout.device, non_blocking=True) for a in arrays]
    outputs = {} if reference is None else {"reference": reference.outputs(*inputs[:2])}
    return policy(
        *inputs,
        temperature=temperature,
        chunk_tokens=layout.logprob_chunk_tokens,
        entropy_gradient=entropy_gradient,
        with_hidden=with_hidden,
        **outputs,
    )
