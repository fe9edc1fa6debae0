"""Inputs of the objective for one micro-batch: trained tokens or values. Importing this loads torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from rlhf_cluster.algorithms.algorithm import Sums


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """Trained positions of one micro-batch, without the model's outputs; N may be 0."""

    streams: Mapping[str, Tensor]  # each [N] float32
    sequence: Tensor  # [N] int64 in [0, num_sequences)
    num_sequences: int
    members: tuple[int, ...]  # [num_sequences] index of each in the batch
    unit_sizes: tuple[int, ...]  # sequences of each unit, in order; their sum is num_sequences

    def sums(self, values: Tensor) -> Tensor:
        """Sum `values` [N] over each sequence: [num_sequences], keeps gradients."""
        return values.new_zeros(self.num_sequences).index_add(0, self.sequence, values)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedTokens(Trained):
    """Trained tokens of one micro-batch, with the policy's outputs."""

    logprobs: Tensor  # [N] float32, carries the gradient
    entropy: Tensor  # [N] float32
    kl: Tensor | None = None  # [N] float32, KL to the reference if computed, with gradient
    hidden: Tensor | None = None  # [N, H] before each token, with gradient, if requested


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainedValues(Trained):
    """Positions of one micro-batch at which a value model is read."""

    values: Tensor  # [N], or [N, K] for a model with K outputs, float32, carries the gradient


class TokenLoss(Protocol):
    def __call__(self, tokens: TrainedTokens, /) -> tuple[Tensor, Sums]:
        """Return this micro-batch's share of the step's loss, a scalar, and metric sums."""
        ...


class ValueLoss(Protocol):
    def __call__(self, values: TrainedValues, /) -> tuple[Tensor, Sums]:
        """Return this micro-batch's share of the step's loss, a scalar, and metric sums."""
        ...
