"""What a loss is given of one micro-batch: the trained tokens or values. Importing it loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained of one micro-batch, without what the model says of it; N may be 0."""

    streams: Mapping[str, Tensor]  # each [N] float32
    sequence: Tensor  # [N] int64 in [0, num_sequences)
    num_sequences: int
    members: tuple[int, ...]  # [num_sequences] which of the batch's sequences each is
    unit_sizes: tuple[int, ...]  # sequences of each unit, in order; they add up to num_sequences

    def sums(self, values: Tensor) -> Tensor:
        """The sum of `values` [N] over each sequence, [num_sequences], with its gradient."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens(Trained):
    """The trained tokens of one micro-batch."""

    logprobs: Tensor  # [N] float32, carries the gradient
    entropy: Tensor  # [N] float32
    kl: Tensor | None = None  # [N] float32, the divergence to the reference if any, with gradient
    hidden: Tensor | None = None  # [N, H] before each token, with gradient, where it was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedValues(Trained):
    """The positions of one micro-batch at which a model of values is read."""

    values: Tensor  # [N], or [N, K] of a model of several, float32, carries the gradient


class TokenLoss(Protocol):
    def __call__(self, tokens: TrainedTokens, /) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the step's loss, a scalar, and metric sums."""
        ...


class ValueLoss(Protocol):
    def __call__(self, found: TrainedValues, /) -> tuple[Tensor, Sums]:
        """As `TokenLoss`."""
        ...
