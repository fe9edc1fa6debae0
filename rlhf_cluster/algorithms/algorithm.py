"""Interface between an algorithm and the learner.

The learner knows no algorithm by name. Once per step it asks for advantages (numpy, by group, never
by position in the batch), and once per micro-batch for token losses (torch). It multiplies each
token's loss by the token's weight and sums. The weight is a function of the algorithm's
`aggregation` and of ALL rollouts of the optimizer step. So the gradient does not depend on the
micro-batch size, the number of ranks, order or packing.

Shapes: N trained tokens of one micro-batch, T response tokens of one rollout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from rlhf_cluster.algorithms.policy_losses import Aggregation
from rlhf_cluster.records import ExperienceGroup

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class LossInputs:
    """Trained tokens of one micro-batch, flattened; float32 unless a field says otherwise.

    Masked tokens are already removed. All trained tokens of a sequence are in one micro-batch.
    """

    learner_logprobs: Tensor  # [N] current policy, carries the gradient
    proximal_logprobs: Tensor  # [N] the learner at the start of the step, no gradient
    sampled_logprobs: Tensor  # [N] the engine's, at sampling
    ref_logprobs: Tensor | None  # [N] frozen reference
    advantages: Tensor  # [N]
    entropy: Tensor  # [N] of the learner's distribution; carries a gradient if `trains_entropy`
    staleness: Tensor  # [N] learner version at the start of the step minus the sampler's
    sequence: Tensor  # [N] int64 in [0, num_sequences): the sequence of each token
    num_sequences: int
    unit_sizes: tuple[int, ...] = ()  # sequences of each unit in order, 1 without `keeps_groups`
    teacher_logprobs: Tensor | None = None  # [N] frozen teacher
    exact_logprobs: Tensor | None = None  # [N] of the version that sampled, as the learner computes
    reference_kl: Tensor | None = None  # [N] KL to the reference over the whole vocabulary, with
    # the gradient of `full_kl_in = "loss"`


Sums = Mapping[str, "tuple[Tensor, Tensor]"]
"""Metrics as name -> (sum, count): both add over micro-batches and ranks and are divided once.
A name that ends in `_max` has (largest, count) and is reduced by maximum instead. A sum may be a
vector [K] of metrics `name/0` to `name/K-1`, with one count or one per entry."""


class Algorithm(Protocol):
    """Advantages, token losses and controller state of one run's algorithm."""

    @property
    def group_size(self) -> int: ...

    @property
    def aggregation(self) -> Aggregation: ...

    @property
    def needs_reference(self) -> bool:
        """Whether the loss cannot be computed without `ref_logprobs`."""
        ...

    @property
    def full_kl_in(self) -> Literal["loss", "reward"] | None:
        """Term that uses the KL over the whole vocabulary, or None. If used, the learner holds the
        reference, and fills `LossInputs.reference_kl`, or each rollout's before advantages."""
        ...

    @property
    def trains_entropy(self) -> bool:
        """Whether the loss uses the entropy with its gradient."""
        ...

    @property
    def needs_proximal(self) -> bool:
        """Whether the loss uses `proximal_logprobs`; if not, the learner skips that forward pass."""
        ...

    @property
    def needs_critic(self) -> bool:
        """Whether this is a `CriticAlgorithm`: the learner trains a value model in addition to the
        policy, and asks for `estimate` instead of `advantages`."""
        ...

    @property
    def needs_greedy(self) -> bool:
        """Whether advantages need `ExperienceGroup.greedy_reward`, of an extra greedy response."""
        ...

    @property
    def zero_advantage_is_zero_loss(self) -> bool:
        """Whether a rollout whose advantages are all 0 has loss 0, so that it can be skipped."""
        ...

    @property
    def keeps_groups(self) -> bool:
        """Whether the loss compares rollouts: the computed rollouts of a group are then one unit,
        which shares an optimizer step and a micro-batch, in the order of the group."""
        ...

    def trained_groups(self, groups: Sequence[ExperienceGroup]) -> Sequence[ExperienceGroup]:
        """Return the groups, with the masks of rollouts cleared that the loss excludes."""
        ...

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`."""
        ...

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """Return the loss of each token [N], not yet weighted, and metric sums."""
        ...

    def correction_weights(self, inputs: LossInputs) -> Tensor | None:
        """Return the factor of each token's loss [N] for its sampler's distance, to be reported.
        No gradient, no change of state. None if the loss has no such weight."""
        ...

    def derive(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Return the metrics to report, given the reduced ones: adds those that are not means."""
        ...

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Update controllers from the metrics of a step, which are equal on every rank."""
        ...

    def state(self) -> dict[str, float]:
        """Return the state that a checkpoint must keep, equal on every rank."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Resume from `state()` as if there had been no interruption."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueInputs:
    """Trained tokens of one micro-batch, flattened, for a value loss; float32."""

    values: Tensor  # [N] the critic's, with gradient
    start_values: Tensor  # [N] the critic's at the start of the step, no gradient
    returns: Tensor  # [N] targets of the values


PerToken = list[list[np.ndarray]]
"""One array [T] per rollout, nested like `groups[i].scored[j]`."""


class CriticAlgorithm(Algorithm, Protocol):
    """Algorithm whose advantages come from a learned value function."""

    def estimate(
        self, groups: Sequence[ExperienceGroup], values: PerToken
    ) -> tuple[PerToken, PerToken]:
        """Return (advantages, returns), float32, given the value before each response token.

        Values of tokens that are not trained must not change the result.
        """
        ...

    def value_loss(self, inputs: ValueInputs) -> tuple[Tensor, Sums]:
        """Return the value loss of each token [N], not yet weighted, and metric sums."""
        ...
