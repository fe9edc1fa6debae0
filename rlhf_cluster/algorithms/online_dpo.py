"""Online DPO: a preference loss of pairs that the policy sampled and the scoring pool judged.

    in each group   chosen = the response with the highest reward, rejected = that with the lowest
    loss            (1 / P) sum over the P pairs of an optimizer step of L(pair)

L is any loss of pairs of `algorithms.preference_loss_config` (default DPO), computed as in the offline
stage `preference`. Log-probabilities of policy and reference are those of the trained tokens at the
sampling temperature. Guo et al. 2024, arXiv 2402.04792, compare two responses per prompt; the others
of a larger group are not trained. Among equal rewards the earlier response is taken. A group whose
rewards are all equal up to rounding gives no pair. A step without a pair has loss 0.

There is no correction for staleness. A policy gradient is an expectation under the policy, so samples
of an older one need a weight. A preference loss takes a pair as given, whichever policy sampled it, as
it does offline. Staleness only changes which pairs are seen: those of an older policy, which the newer
one may have learnt already. `importance/*` still reports the distance to the sampler. Every optimizer
step computes the loss of its pairs under the current policy, so several epochs or minibatches need no
proximal policy.

Promises: value and gradient are those of the mean over the pairs of the optimizer step, whatever the
ranks, micro-batches and packing; gradients flow into `learner_logprobs` only; while the policy equals
the reference every log-ratio is 0 up to the rounding of passes with different packing.

Shapes: N trained tokens of a micro-batch, P pairs of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
from pydantic import Field

from rlhf_cluster.algorithms.advantages import all_equal
from rlhf_cluster.algorithms.algorithm import LossInputs, PerToken, Sums
from rlhf_cluster.algorithms.off_policy_distance import derive_distance, distance_sums
from rlhf_cluster.algorithms.policy_gradient import reference_sums
from rlhf_cluster.algorithms.policy_gradient_config import AlgorithmSection
from rlhf_cluster.algorithms.policy_losses import Aggregation
from rlhf_cluster.algorithms.preference_loss_config import (
    DpoConfig,
    DpopConfig,
    IpoConfig,
    OrpoConfig,
    RobustDpoConfig,
    SimpoConfig,
)
from rlhf_cluster.algorithms.preference_losses import Pairs
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor

PairLossChoice = Annotated[
    DpoConfig | DpopConfig | IpoConfig | OrpoConfig | RobustDpoConfig | SimpoConfig,
    Field(discriminator="type"),
]


class OnlineDpoConfig(AlgorithmSection):
    """Direct preference optimisation on sampled pairs (Guo et al. 2024, arXiv 2402.04792)."""

    type: Literal["online_dpo"] = "online_dpo"
    group_size: int = Field(default=2, ge=2)
    """Rollouts of one prompt; the best and the worst are compared."""
    loss: PairLossChoice = DpoConfig()
    """Loss of pairs and its keys; see `algorithms.preference_loss_config`."""
    dynamic_sampling: bool = False
    """Discard groups whose rewards are all equal, and sample others in their place."""

    def trains_on(self, rewards: Sequence[float]) -> bool:
        return not (self.dynamic_sampling and all_equal(rewards))

    @property
    def aggregation(self) -> Aggregation:
        """Sequence mean: the weights of a pair's tokens add up to one share of the mean over pairs."""
        return "sequence_mean"

    @property
    def unit_size(self) -> int:
        return 2

    @property
    def no_steps(self) -> str | None:
        return "it compares whole responses"

    @property
    def needs_reference(self) -> bool:
        return self.loss.needs_reference


class OnlineDpo:
    """Online DPO; implements `algorithms.algorithm.Algorithm`. A rollout's advantage is its role in the
    pair: 1 chosen, -1 rejected, 0 neither."""

    full_kl_in: Literal["loss", "reward"] | None = None
    trains_entropy = False
    needs_proximal = False
    needs_critic = False
    needs_greedy = False
    zero_advantage_is_zero_loss = True
    keeps_groups = True

    def __init__(self, config: Any, max_response_tokens: int | None = None) -> None:
        self.config: OnlineDpoConfig = config
        self._pairs: dict[str, float] = {}

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def aggregation(self) -> Aggregation:
        return self.config.aggregation

    @property
    def needs_reference(self) -> bool:
        return self.config.needs_reference

    def trained_groups(self, groups: Sequence[ExperienceGroup]) -> Sequence[ExperienceGroup]:
        """Return the groups, with the masks of all rollouts cleared that are in no pair.

        Without any pair the groups are unchanged; their advantages are 0.
        """
        pairs = [choose_pair(group) for group in groups]
        num_pairs = sum(pair is not None for pair in pairs)
        self._pairs = {
            "preference/pairs": float(num_pairs),
            "preference/tied_groups": float(len(groups) - num_pairs),
        }
        if not num_pairs:
            return groups
        return [_mask_others(group, pair or ()) for group, pair in zip(groups, pairs, strict=True)]

    def advantages(self, groups: Sequence[ExperienceGroup]) -> PerToken:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`."""
        return [_mark_pair(group) for group in groups]

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """Return for each token [N] the loss of its pair, not yet weighted, and metric sums.

        Raises:
            RecordError: units that are not pairs, or a missing reference that the loss needs.
        """
        pairs = _build_pairs(inputs, self.config.loss.needs_reference)
        losses, sums = self.config.loss.losses(pairs)
        return losses[inputs.sequence // 2], {
            **sums,
            **distance_sums(
                inputs.learner_logprobs, inputs.sampled_logprobs.detach(), inputs.staleness
            ),
            **reference_sums(inputs),
        }

    def correction_weights(self, inputs: LossInputs) -> Tensor | None:
        """Return None: a preference loss takes a pair as given, whichever policy sampled it."""
        return None

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics to report, given the reduced ones, and the number of pairs."""
        return derive_distance(means) | self._pairs

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Do nothing: no controller depends on the step."""

    def state(self) -> dict[str, float]:
        """Return no state: nothing outlives a step."""
        return {}

    def load_state(self, state: Mapping[str, float]) -> None:
        """Resume from `state()`, which is empty."""


def choose_pair(group: ExperienceGroup) -> tuple[int, int] | None:
    """Return the indices of the chosen and of the rejected response among those with a trained token;
    None for a group whose rewards are all equal."""
    trained = [i for i, s in enumerate(group.scored) if s.rollout.response_mask.any()]
    rewards = [group.scored[i].reward for i in trained]
    if all_equal(rewards):
        return None
    return trained[int(np.argmax(rewards))], trained[int(np.argmin(rewards))]


def _mark_pair(group: ExperienceGroup) -> list[np.ndarray]:
    marks = np.zeros(len(group.scored), dtype=np.float32)
    if (pair := choose_pair(group)) is not None:
        marks[list(pair)] = 1.0, -1.0
    return [
        np.full(len(s.rollout.response_ids), mark, dtype=np.float32)
        for s, mark in zip(group.scored, marks, strict=True)
    ]


def _mask_others(group: ExperienceGroup, indices: Sequence[int]) -> ExperienceGroup:
    scored = (s if i in indices else _clear_mask(s) for i, s in enumerate(group.scored))
    return replace(group, scored=tuple(scored))


def _clear_mask(scored: ScoredRollout) -> ScoredRollout:
    nothing = np.zeros_like(scored.rollout.response_mask)
    return replace(scored, rollout=replace(scored.rollout, response_mask=nothing))


def _build_pairs(inputs: LossInputs, with_reference: bool) -> Pairs:
    if set(inputs.unit_sizes) - {2} or 2 * len(inputs.unit_sizes) != inputs.num_sequences:
        raise RecordError(
            f"{inputs.num_sequences} sequences in {len(inputs.unit_sizes)} units of "
            f"{sorted(set(inputs.unit_sizes))}: online DPO needs the two of each pair together"
        )
    if with_reference and inputs.ref_logprobs is None:
        raise RecordError(
            "algorithm.type = 'online_dpo' but the experience has no ref_logprobs. Set "
            "scoring.reference = true"
        )

    def sums(values: Tensor) -> Tensor:
        return values.new_zeros(inputs.num_sequences).index_add(0, inputs.sequence, values)

    logprobs = inputs.learner_logprobs
    first = sums(inputs.advantages)[0::2] > 0

    def sides(values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums over the chosen and over the rejected responses, [P] each."""
        one, other = sums(values).view(-1, 2).unbind(1)
        return one.where(first, other), other.where(first, one)

    chosen, rejected = sides(logprobs)
    chosen_tokens, rejected_tokens = sides(logprobs.detach().new_ones(logprobs.shape))
    ref = None if inputs.ref_logprobs is None else sides(inputs.ref_logprobs.detach())
    return Pairs(
        chosen=chosen,
        rejected=rejected,
        chosen_tokens=chosen_tokens,
        rejected_tokens=rejected_tokens,
        ref_chosen=None if ref is None else ref[0],
        ref_rejected=None if ref is None else ref[1],
    )
