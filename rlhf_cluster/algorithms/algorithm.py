"""What an algorithm is to the learner.

The learner is algorithm-blind: it asks for advantages once a step (numpy, by group, never by
position in the batch) and for token losses once a micro-batch (torch). It multiplies each token's
loss by that token's weight, which follows from the algorithm's `aggregation` and from ALL rollouts
of the optimizer step, and sums: so the gradient depends neither on the micro-batch size, nor on the
number of ranks, nor on order or packing.

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
    """The trained tokens of one micro-batch, flattened; float32 where nothing else is said.

    Masked tokens are already gone. All trained tokens of a sequence are in one micro-batch.
    """

    learner_logprobs: Tensor  # [N] current policy, carries the gradient
    proximal_logprobs: Tensor  # [N] the learner at the start of the step, no gradient
    sampled_logprobs: Tensor  # [N] the engine's, at sampling
    ref_logprobs: Tensor | None  # [N] frozen reference
    advantages: Tensor  # [N]
    entropy: Tensor  # [N] of the learner's distribution; with gradient if `trains_entropy`
    staleness: Tensor  # [N] learner version at the start of the step minus the sampler's
    sequence: Tensor  # [N] int64 in [0, num_sequences): which sequence a token belongs to
    num_sequences: int
    unit_sizes: tuple[int, ...] = ()  # sequences of each unit in order, 1 without `keeps_groups`
    teacher_logprobs: Tensor | None = None  # [N] frozen teacher
    exact_logprobs: Tensor | None = None  # [N] of the version that sampled, as the learner computes
    reference_kl: Tensor | None = None  # [N] KL to the reference over the whole vocabulary, with
    # the gradient of `full_kl_in = "loss"`


Sums = Mapping[str, "tuple[Tensor, Tensor]"]
"""Metrics as name -> (sum, count), so that they add over micro-batches and ranks and divide once.
A name that ends in `_max` carries (largest, count) and is reduced by maximum instead. A sum may be a
vector [K] of metrics `name/0` to `name/K-1`, with one count or one an entry."""


class Algorithm(Protocol):
    @property
    def group_size(self) -> int: ...

    @property
    def aggregation(self) -> Aggregation: ...

    @property
    def needs_reference(self) -> bool:
        """The loss cannot be computed without `ref_logprobs`."""
        ...

    @property
    def full_kl_in(self) -> Literal["loss", "reward"] | None:
        """Where the KL over the whole vocabulary is used, if it is: the learner then holds the
        reference, and gives `LossInputs.reference_kl`, or each rollout's before advantages."""
        ...

    @property
    def trains_entropy(self) -> bool:
        """The loss uses the entropy with its gradient."""
        ...

    @property
    def needs_proximal(self) -> bool:
        """The loss uses `proximal_logprobs`; if not, no pass is spent on them."""
        ...

    @property
    def needs_critic(self) -> bool:
        """The algorithm is a `CriticAlgorithm`: the learner trains a value model beside the policy,
        and asks for `estimate` instead of `advantages`."""
        ...

    @property
    def needs_greedy(self) -> bool:
        """Advantages need `ExperienceGroup.greedy_reward`: every prompt is answered greedily too."""
        ...

    @property
    def zero_advantage_is_zero_loss(self) -> bool:
        """A rollout whose advantages are all 0 has loss 0, and need not be computed."""
        ...

    @property
    def keeps_groups(self) -> bool:
        """The loss compares rollouts: those of a group that are computed are one unit, which shares
        an optimizer step and a micro-batch, in the order of the group."""
        ...

    def trained_groups(self, groups: Sequence[ExperienceGroup]) -> Sequence[ExperienceGroup]:
        """The same groups, with the masks of rollouts cleared that are left out of the loss."""
        ...

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """One float32 array [T] per rollout, nested like `groups[i].scored[j]`."""
        ...

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """The loss of each token [N], not yet weighted, and metric sums."""
        ...

    def correction_weights(self, inputs: LossInputs) -> Tensor | None:
        """What `loss` multiplies each token [N] by for the distance of its sampler, for people. No
        gradient, no state. None where the loss has no such weight."""
        ...

    def derive(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """The metrics to report, from the reduced ones: adds what is no mean of tokens."""
        ...

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """A step ended with these metrics, the same on every rank; controllers move here."""
        ...

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep of the algorithm, the same on every rank."""
        ...

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from `state()` as if there had been no interruption."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueInputs:
    """The trained tokens of one micro-batch, flattened, as a value loss sees them; float32."""

    values: Tensor  # [N] the critic's, with gradient
    start_values: Tensor  # [N] the critic's at the start of the step, no gradient
    returns: Tensor  # [N] what the values are to be


PerToken = list[list[np.ndarray]]
"""One array [T] per rollout, nested like `groups[i].scored[j]`."""


class CriticAlgorithm(Algorithm, Protocol):
    """An algorithm whose advantages come from a learned value function."""

    def estimate(
        self, groups: Sequence[ExperienceGroup], values: PerToken
    ) -> tuple[PerToken, PerToken]:
        """(advantages, returns), float32, from the value before each response token is sampled.

        Values of tokens that are not trained must not matter.
        """
        ...

    def value_loss(self, inputs: ValueInputs) -> tuple[Tensor, Sums]:
        """The value loss of each token [N], not yet weighted, and metric sums."""
        ...
