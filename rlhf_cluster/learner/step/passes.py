"""Forward and backward passes of one optimizer step, for any loss that is a sum over tokens, or over
units of sequences that are laid out together (`packing.plan`).

Promises: gradients end up as those of the sum of all micro-batches' losses of all ranks, whatever
the number of ranks and micro-batches and the batching. Every rank makes the same number of passes:
a dummy goes through the model and the loss with no token, so its gradient is zero and its
collectives match those of the others.

Shapes: N trained tokens of one micro-batch, K values a position of a model of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.micro_batch_loss import (
    TokenLoss,
    TrainedTokens,
    TrainedValues,
    ValueLoss,
)
from rlhf_cluster.data.packing import (
    Batching,
    MicroBatch,
    MicroBatchPlan,
    TokenSequence,
    collate,
    plan,
)
from rlhf_cluster.learner.sharding.sharded_model import ShardedModel
from rlhf_cluster.learner.step.metric_sums import MetricSums
from rlhf_cluster.models.divergence import (
    REVERSE_KL,
    Divergence,
)


class Reference(Protocol):
    """A frozen model of the policy's architecture."""

    def outputs(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Last hidden states [B, S, H] and output projection [V, H], None where it is the policy's.

        Every rank must take part. Both are there until `release`.
        """
        ...

    def release(self) -> None:
        """Free what was gathered; call after the last backward pass that used `outputs`."""
        ...

    def as_policy(self) -> AbstractContextManager[Any]:
        """A model that answers as a `PolicyLM`, for passes without gradient. Every rank must take
        part."""
        ...


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
    unit_sizes: Sequence[int] | None = None,
    divergence: Divergence = REVERSE_KL,
) -> None:
    """Accumulate this rank's share of the gradient, and its metrics in `sums`. Where gradients are
    off, the metrics alone.

    Args:
        sequences: of ALL ranks, the same on each but for streams; the plan picks this rank's.
        streams: names of the sequences' streams that `loss` receives.
        temperature: of the distribution that is scored.
        loss: the shares of all micro-batches of all ranks add up to the loss that is descended.
        entropy_gradient: whether the loss needs the entropy's gradient.
        with_hidden: whether the loss needs the policy's last hidden states.
        reference: the policy whose KL the loss needs; its passes come on top.
        unit_sizes: how many of the sequences make up each unit, see `packing.plan`.
        divergence: what stands for the KL to the reference.
    """
    for batch, trained, common in _micro_batches(sequences, streams, layout, unit_sizes):
        logprobs, entropy, *more = _forward(
            policy,
            batch,
            temperature,
            layout,
            entropy_gradient,
            with_hidden,
            reference,
            divergence,
        )
        tokens = TrainedTokens(
            logprobs=trained(logprobs),
            entropy=trained(entropy),
            kl=trained(more[0]) if reference is not None else None,
            hidden=trained(more[-1]) if with_hidden else None,
            **common,
        )
        _descend(policy, *loss(tokens), layout, sums)
    if reference is not None:
        reference.release()


def run_value_passes(
    model: ShardedModel,
    sequences: Sequence[TokenSequence],
    streams: Sequence[str],
    layout: Layout,
    loss: ValueLoss,
    sums: MetricSums,
    unit_sizes: Sequence[int] | None = None,
) -> None:
    """`run_passes` for a model of values (`critic.ValueLM`)."""
    for batch, trained, common in _micro_batches(sequences, streams, layout, unit_sizes):
        found = TrainedValues(values=trained(values_of(model, batch, layout)), **common)
        _descend(model, *loss(found), layout, sums)


def _descend(
    model: ShardedModel, share: Tensor, metrics: Sums, layout: Layout, sums: MetricSums
) -> None:
    if torch.is_grad_enabled():
        # the sharded model averages gradients over ranks; times `ranks` makes it their sum
        model.backward(share * layout.ranks)
    sums.add(metrics)


def _micro_batches(
    sequences: Sequence[TokenSequence],
    streams: Sequence[str],
    layout: Layout,
    unit_sizes: Sequence[int] | None,
) -> Iterator[tuple[MicroBatch, Callable[[Tensor], Tensor], dict[str, Any]]]:
    """Each of this rank's micro-batches, what picks its trained positions, and the fields that are
    the same for every model."""
    sizes = [1] * len(sequences) if unit_sizes is None else unit_sizes
    firsts = dict(zip(np.cumsum([0, *sizes]).tolist(), sizes, strict=False))
    for planned in own_plan(sequences, layout, unit_sizes):
        batch = collate(planned, sequences, streams)
        mask = torch.from_numpy(batch.mask).to(layout.device, non_blocking=True)

        def trained(found: Tensor, mask: Tensor = mask) -> Tensor:
            return found[mask]

        def placed(array: np.ndarray, mask: Tensor = mask) -> Tensor:
            return torch.from_numpy(array).to(layout.device, non_blocking=True)[mask]

        members = tuple(span.sequence for span in batch.spans)
        common = {
            "streams": {name: placed(values) for name, values in batch.streams.items()},
            "sequence": placed(batch.sequence),
            "num_sequences": len(members),
            "members": members,
            "unit_sizes": tuple(firsts[index] for index in members if index in firsts),
        }
        yield batch, trained, common


@torch.no_grad()
def score(
    policy: ShardedModel,
    sequences: Sequence[TokenSequence],
    temperature: float,
    layout: Layout,
    reference: Reference | None = None,
    unit_sizes: Sequence[int] | None = None,
) -> dict[int, np.ndarray]:
    """Log-probabilities of the targets [T] float32, of those sequences that `run_passes` with the
    same sequences, layout and units would compute on this rank, by their index. With a reference the
    KL to it at each target instead."""
    found = {}
    for planned in own_plan(sequences, layout, unit_sizes):
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


@torch.no_grad()
def score_values(
    model: Callable[..., Tensor],
    sequences: Sequence[TokenSequence],
    layout: Layout,
    unit_sizes: Sequence[int] | None = None,
) -> dict[int, np.ndarray]:
    """`score` for a model of values: [T] or [T, K] float32 of this rank's sequences."""
    found = {}
    for planned in own_plan(sequences, layout, unit_sizes):
        batch = collate(planned, sequences)
        values = values_of(model, batch, layout).float().cpu().numpy()
        for span in batch.spans:
            found[span.sequence] = values[span.row, span.start : span.stop].copy()
    return found


def values_of(model: Callable[..., Tensor], batch: MicroBatch, layout: Layout) -> Tensor:
    """What a model of values says after each position, [B, S] or [B, S, K]."""
    arrays = (batch.input_ids, batch.position_ids)
    return model(*(torch.from_numpy(a).to(layout.device, non_blocking=True) for a in arrays))


def on_every_rank(
    own: Mapping[int, np.ndarray],
    lengths: Sequence[int],
    layout: Layout,
    width: tuple[int, ...] = (),
) -> list[np.ndarray]:
    """Values [T] float32 of all sequences, of which each is in one rank's `own` by its index; with
    `width` (K,), [T, K].

    Waits for all ranks (one collective).
    """
    ends = np.cumsum(lengths)
    flat = np.zeros((ends[-1], *width), dtype=np.float32)
    for index, values in own.items():
        flat[ends[index] - lengths[index] : ends[index]] = values
    shared = torch.from_numpy(flat).to(layout.device)
    dist.all_reduce(shared)
    return np.split(shared.cpu().numpy(), ends[:-1])


def own_plan(
    sequences: Sequence[TokenSequence], layout: Layout, unit_sizes: Sequence[int] | None = None
) -> list[MicroBatchPlan]:
    """This rank's micro-batches, as many as every other rank's."""
    plans = plan(
        [s.num_inputs for s in sequences],
        layout.ranks,
        layout.tokens_per_micro_batch,
        layout.tokens_per_row,
        layout.batching,
        unit_sizes,
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
    divergence: Divergence = REVERSE_KL,
) -> tuple[Tensor, ...]:
    arrays = (batch.input_ids, batch.position_ids, batch.labels)
    inputs = [torch.from_numpy(a).to(layout.device, non_blocking=True) for a in arrays]
    outputs: dict[str, Any] = {}
    if reference is not None:
        outputs = {"reference": reference.outputs(*inputs[:2]), "divergence": divergence}
    return policy(
        *inputs,
        temperature=temperature,
        chunk_tokens=layout.logprob_chunk_tokens,
        entropy_gradient=entropy_gradient,
        with_hidden=with_hidden,
        **outputs,
    )
