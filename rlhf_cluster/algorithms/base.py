"""What an algorithm is to the learner.

The learner is algorithm-blind: it asks for advantages once a step (numpy, by group, never by
position in the batch) and for a loss once a micro-batch (torch). Losses come back as SUMS over
the micro-batch's trained tokens; the learner divides by the token count of the whole step, so the
gradient depends neither on the micro-batch size, nor on the number of ranks, nor on packing.

Shapes: N trained tokens of one micro-batch, T response tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """The trained tokens of one micro-batch, float32, flattened. Masked tokens are already gone."""

    learner_logprobs: Tensor  # [N] current policy, carries the gradient
    sampled_logprobs: Tensor  # [N] the engine's, at sampling
    ref_logprobs: Tensor | None  # [N] frozen reference
    advantages: Tensor  # [N]
    entropy: Tensor  # [N] of the learner's distribution, no gradient


Sums = Mapping[str, "tuple[Tensor, Tensor]"]
"""Metrics as name -> (sum, count), so that they add over micro-batches and ranks and divide once.
A name that ends in `_max` carries (largest, count) and is reduced by maximum instead."""


class Algorithm(Protocol):
    @property
    def group_size(self) -> int: ...

    @property
    def needs_reference(self) -> bool:
        """The loss cannot be computed without `ref_logprobs`."""
        ...

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """One float32 array [T] per rollout, nested like `groups[i].scored[j]`."""
        ...

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """The sum of the token losses, and metric sums."""
        ...

    def derive(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The metrics to report, from the reduced ones: adds what is no mean of tokens."""
        ...
