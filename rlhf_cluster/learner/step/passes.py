"""Forward and backward passes of one optimizer step, for any loss that is a sum, and their metric sums.

The sum is over tokens, or over units of sequences that are in the same micro-batch (`packing.plan`).
Metric sums are added over micro-batches, reduced over ranks once, and divided once. Every rank must
have added the same names; a rank without tokens adds them with count 0.

Promises:
- gradients and metrics are those of all micro-batches of all ranks, whatever the number of ranks, the
  number of micro-batches and the batching;
- every rank makes the same number of passes. A dummy pass runs model and loss without a token, so its
  gradient is zero, and its collectives match those of the other ranks;
- a metric to which no token contributed is omitted, and not reported as 0 or NaN.

Shapes: N trained tokens of one micro-batch, K values per position of a value model.
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
from rlhf_cluster.models.divergence import REVERSE_KL, Divergence


class MetricSums:
    """Sums and counts of metrics by name. A name that ends in `_max` keeps the largest value.

    A sum that is a vector [K], with one count for all entries or one per entry, is K metrics: `name/0`
    to `name/K-1`.
    """

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, sums: Sums) -> None:
        """Add the sums of one micro-batch. They stay on the device, so nothing is waited for."""
        for name, (total, count) in sums.items():
            total, count = total.detach().double(), count.detach().double()
            count = count.expand_as(total)
            if name.endswith("_max"):
                total = torch.where(count > 0, total, torch.full_like(total, -torch.inf))
            if name in self._sums:
                old_total, old_count = self._sums[name]
                largest = name.endswith("_max")
                total = torch.maximum(old_total, total) if largest else old_total + total
                count = old_count + count
            self._sums[name] = (total, count)

    def reduce(self) -> dict[str, float]:
        """Compute the metrics over the tokens of all ranks, the same on every rank.

        Waits for: all ranks (two collectives), at most until the deadline of the process group.
        """
        if not self._sums:
            return {}
        # The ranks add up by place, and may have met the names in another order.
        entries = sorted(self._sums.items())
        names = [own for name, (total, _) in entries for own in _names(name, total)]
        maxima = [n.endswith("_max") for n, (total, _) in entries for _ in range(total.numel())]
        totals = torch.cat([total.reshape(-1) for _, (total, _) in entries])
        counts = torch.cat([count.reshape(-1) for _, (_, count) in entries])
        keeps_largest = torch.tensor(maxima, device=totals.device)
        summed = torch.stack([totals.masked_fill(keeps_largest, 0.0), counts])
        largest = totals.masked_fill(~keeps_largest, -torch.inf)
        dist.all_reduce(summed)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        found: dict[str, float] = {}
        columns = (names, maxima, *summed.tolist(), largest.tolist())
        for name, is_maximum, total, count, most in zip(*columns, strict=True):
            if count > 0:
                found[name] = most if is_maximum else total / count
        return found


def _names(name: str, total: Tensor) -> list[str]:
    return [f"{name}/{i}" for i in range(total.numel())] if total.ndim else [name]


class Reference(Protocol):
    """Frozen model with the policy's architecture."""

    def outputs(self, input_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute the last hidden states [B, S, H]; also returns the output projection [V, H].

        The projection is None if it is the policy's. Every rank must take part. Both are valid until
        `release`.
        """
        ...

    def release(self) -> None:
        """Free gathered weights; call after the last backward pass that used `outputs`."""
        ...

    def as_policy(self) -> AbstractContextManager[Any]:
        """Return a context with a model like `PolicyLM`, for passes without gradient.

        Every rank must take part.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Settings by which one rank splits its share of a batch into passes."""

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
    """Accumulate this rank's share of the gradient, and its metrics in `sums`.

    If gradients are disabled, only the metrics are computed.

    Args:
        sequences: those of ALL ranks, equal on each rank apart from streams. The plan selects this
            rank's.
        streams: names of the sequences' streams that `loss` receives.
        temperature: that of the distribution that is scored.
        loss: its shares of all micro-batches of all ranks add up to the loss that is minimised.
        entropy_gradient: whether the loss needs the entropy's gradient.
        with_hidden: whether the loss needs the policy's last hidden states.
        reference: policy to which the loss needs the KL; it needs additional passes.
        unit_sizes: number of sequences in each unit, see `packing.plan`.
        divergence: divergence that is computed as the KL to the reference.
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
    """Accumulate gradient and metrics like `run_passes`, for a value model (`critic.ValueLM`)."""
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
    """Yield this rank's micro-batches.

    Each comes with a function that selects its trained positions, and with the fields of the loss's
    argument that are the same for every model.
    """
    sizes = [1] * len(sequences) if unit_sizes is None else unit_sizes
    # Not strict: the last sum is the end, where no unit begins.
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
    """Compute log-probabilities of the targets, [T] float32, of this rank's sequences by index.

    These are the sequences that `run_passes` computes on this rank for the same sequences, layout and
    units. With a reference, the result is the KL to it at each target instead.
    """
    found = {}
    for planned in own_plan(sequences, layout, unit_sizes):
        batch = collate(planned, sequences)
        logprobs, _, *kl = _forward(
            policy, batch, temperature, layout, entropy_gradient=False, reference=reference
        )
        values = (kl[0] if kl else logprobs).float().cpu().numpy()
        for span in batch.spans:
            # A view would keep the array of the whole micro-batch alive.
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
    """Compute values at the targets, [T] or [T, K] float32, of this rank's sequences by index."""
    found = {}
    for planned in own_plan(sequences, layout, unit_sizes):
        batch = collate(planned, sequences)
        values = values_of(model, batch, layout).float().cpu().numpy()
        for span in batch.spans:
            found[span.sequence] = values[span.row, span.start : span.stop].copy()
    return found


def values_of(model: Callable[..., Tensor], batch: MicroBatch, layout: Layout) -> Tensor:
    """Compute the values of a value model after each position, [B, S] or [B, S, K]."""
    arrays = (batch.input_ids, batch.position_ids)
    return model(*(torch.from_numpy(a).to(layout.device, non_blocking=True) for a in arrays))


def on_every_rank(
    own: Mapping[int, np.ndarray],
    lengths: Sequence[int],
    layout: Layout,
    width: tuple[int, ...] = (),
) -> list[np.ndarray]:
    """Gather values of all sequences, [T] float32, or [T, K] with `width` (K,), on every rank.

    Args:
        own: this rank's values by index of the sequence. Each sequence is in that of one rank.
    Waits for: all ranks (one collective).
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
    """Return the plan of this rank's micro-batches, whose number is the same on every rank."""
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
