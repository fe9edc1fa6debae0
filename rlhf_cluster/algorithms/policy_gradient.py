"""The loss that policy-gradient algorithms share. Each algorithm fills in surrogate and advantages.

For a token t with advantage A_t:

    loss_t = w_t surrogate(log pi_t - log prox_t, A_t) + kl_coef KL_t - entropy_coef H_t

    proximal = "recompute"     prox is the learner at the start of the step; w = prox / mu by the rule
    proximal = "interpolate"   prox is between sampler and learner (`importance_weights`); w likewise
    proximal = "bypass"        prox = mu, the sampler: the ratio r of the surrogate IS the importance
                               weight. A token rule that truncates to [low, high] scales what the
                               surrogate lets through, w = sg(clip(r, low, high) / r), else w = 1; a
                               rule that masks masks tokens or rollouts, by pi / mu

where pi is the learner, mu the sampler, `correction` the rule (`off_policy_correction`), KL_t the
term of `kl` with the token's own weight, and H_t the entropy. The code reads in this order: `loss`,
`correct` (which ratio, which weight) and `weigh` (the rules) are the last of the class and what
follows it.

With one optimizer step per batch the recomputed prox IS pi: the ratio is exactly 1 in value, carries
the gradient, and is never clipped; w alone handles the distance to the sampler.

In "bypass" the surrogate decides by the true ratio (its clip, its gate, `dual_clip` of Ye et al. 2020,
arXiv 1912.09729). A token above the cap c that it lets through is trained with the weight c: with no
gradient, exactly the tokens that the sampler drew too rarely would stay untrained. Capping before the
surrogate would hide from it how far the token is.

Promises: gradients flow into `learner_logprobs` (and the entropy) only; a token's loss depends on
its own rollout only. The three policies: Hilton et al. 2021, arXiv 2110.00641.

An algorithm subclasses `PolicyGradient` with `surrogate` and either `response_advantages` (one
number per response) or `advantages` (one per token), and its configuration `PolicyGradientConfig`.

Shapes: N trained tokens of a micro-batch, R rollouts of a step, T response tokens of a rollout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np

from rlhf_cluster.algorithms.algorithm import LossInputs, PerToken, Sums
from rlhf_cluster.algorithms.importance_weights import (
    interpolated_proximal,
    level_log_ratios,
    log_ratio,
    token_cap,
)
from rlhf_cluster.algorithms.kl import KlController, k3, kl_loss, reward_penalty
from rlhf_cluster.algorithms.off_policy_correction import Rule
from rlhf_cluster.algorithms.off_policy_distance import (
    derive_distance,
    distance_sums,
    shares_by_staleness,
)
from rlhf_cluster.algorithms.policy_gradient_config import (
    ClippedConfig,
    PolicyGradientConfig,
    Proximal,
)
from rlhf_cluster.algorithms.policy_losses import Aggregation, clipped_policy_loss
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C", bound=PolicyGradientConfig)


class PolicyGradient(ABC, Generic[C]):
    """All of `algorithms.algorithm.Algorithm` but `surrogate` and the advantages."""

    def __init__(self, config: C, max_response_tokens: int | None = None) -> None:
        self.config = config
        self.max_response_tokens = max_response_tokens
        self._kl = KlController(config.kl_coef, config.kl_control)

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def aggregation(self) -> Aggregation:
        return self.config.aggregation

    @property
    def needs_reference(self) -> bool:
        return self.config.needs_reference

    @property
    def full_kl_in(self) -> Literal["loss", "reward"] | None:
        return self.config.full_kl_in

    @property
    def trains_entropy(self) -> bool:
        return self.config.entropy_coef > 0

    @property
    def needs_proximal(self) -> bool:
        return self.config.proximal == "recompute"

    @property
    def needs_critic(self) -> bool:
        return False

    @property
    def needs_greedy(self) -> bool:
        return False

    @property
    def zero_advantage_is_zero_loss(self) -> bool:
        return not (self.trains_entropy or (self.config.kl_active and self.config.kl_in == "loss"))

    @property
    def keeps_groups(self) -> bool:
        return self.config.unit_size > 1

    @property
    def kl_coef(self) -> float:
        """Coefficient of the KL term in the current step, or in the next one between two steps."""
        return self._kl.coef

    # What an algorithm fills in

    @abstractmethod
    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """Return the policy loss of each token [N] without its correction weight, and metric sums.

        Args:
            log_ratios: [N] log pi - log prox, carries the gradient.
            inputs: the micro-batch of these tokens.
        """

    def surrogate_log_ratios(self, log_ratios: Tensor, inputs: LossInputs) -> Tensor:
        """Return the log-ratios [N] that the surrogate uses: here those of the tokens themselves."""
        return log_ratios

    def truncation(self, ratios: Tensor, low: float, high: float) -> Tensor:
        """Return the factor [N] that moves weights of these ratios [N] to the bounds."""
        return ratios.clamp(low, high) / ratios

    def response_reward(self, scored: ScoredRollout) -> float:
        """Return the reward that `response_advantages` sees, before the KL penalty."""
        return scored.reward

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        """Return advantages [R] for float64 rewards [R], less their KL penalty, and group ids [R]."""
        raise NotImplementedError(
            f"{type(self).__name__} has advantages per token, not per response"
        )

    # What the learner asks for once per step

    def advantages(self, groups: Sequence[ExperienceGroup]) -> PerToken:
        """Return one float32 array [T] per rollout, nested like `groups[i].scored[j]`.

        Every token of a response has the response's advantage. Groups with the same id are merged.

        Raises:
            RecordError: a KL in the reward, and rollouts without reference log-probabilities.
        """
        rewards = np.array(
            [
                self.response_reward(s) - self.token_penalties(s).sum()
                for g in groups
                for s in g.scored
            ],
            dtype=np.float64,
        )
        group_ids = [g.group_id for g in groups for _ in g.scored]
        values = iter(self.response_advantages(rewards, group_ids))
        return [
            [
                np.full(len(s.rollout.response_ids), next(values), dtype=np.float32)
                for s in group.scored
            ]
            for group in groups
        ]

    def trained_groups(self, groups: Sequence[ExperienceGroup]) -> Sequence[ExperienceGroup]:
        """Return the groups, with the masks of rollouts cleared that the loss excludes."""
        return groups

    def token_penalties(self, scored: ScoredRollout) -> np.ndarray:
        """Return the KL penalty of the reward at each token, times the coefficient: [T] float64."""
        rollout = scored.rollout
        if not (self.config.kl_active and self.config.kl_in == "reward"):
            return np.zeros(len(rollout.response_ids))
        estimator = self.config.estimator
        if estimator == "full":
            if scored.reference_kl is None:
                raise RecordError(_no_full_kl(f"rollout {rollout.rollout_id}"))
            kl = scored.reference_kl.astype(np.float64)
            return self.kl_coef * np.where(rollout.response_mask, kl, 0.0)
        if scored.ref_logprobs is None:
            raise RecordError(self._no_reference(f"rollout {rollout.rollout_id}"))
        return self.kl_coef * reward_penalty(
            estimator,
            rollout.sampled_logprobs,
            scored.ref_logprobs,
            rollout.response_mask,
        )

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the metrics to report, given the reduced ones: adds those that are not means."""
        metrics = derive_distance(means)
        return metrics | {"learner/kl_coef": self.kl_coef} if self.config.kl_active else metrics

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """Update the KL coefficient from the metrics of a step, which are equal on every rank."""
        self._kl.update(
            metrics.get("learner/kl_ref_response"), int(metrics.get("learner/rollouts", 0))
        )

    def state(self) -> dict[str, float]:
        """Return the state that a checkpoint must keep."""
        return self._kl.state()

    def load_state(self, state: Mapping[str, float]) -> None:
        """Resume from `state()`."""
        self._kl.load_state(dict(state))

    def correction_weights(self, inputs: LossInputs) -> Tensor:
        """Return the weight of each token [N] for its sampler's distance, without gradient.

        It is w; with `proximal = "bypass"` it is the ratio to the sampler within the bounds of the
        correction, before the surrogate's own clip. 0 for tokens that the correction masks.

        Raises:
            RecordError: see `loss`.
        """
        log_ratios, corrected = self.correct(self._sampler(inputs), inputs)
        if self.config.proximal != "bypass":
            return corrected.weights
        ratios = self.surrogate_log_ratios(log_ratios, inputs).detach().exp()
        for rule in self.config.correction.rules():
            if rule.action == "truncate":
                ratios = ratios.clamp(rule.low, rule.high)
        return ratios.masked_fill(corrected.masked, 0.0)

    # The parts of the loss: sampler, proximal policy, KL

    def _sampler(self, inputs: LossInputs) -> Tensor:
        if self.config.sampler == "sampled":
            return inputs.sampled_logprobs.detach()
        if inputs.exact_logprobs is None:
            raise RecordError(
                "algorithm.sampler = 'exact' but the experience has no exact_logprobs. Set "
                "scoring.exact_logprobs = true"
            )
        return inputs.exact_logprobs.detach()

    def _proximal(self, inputs: LossInputs, sampler: Tensor) -> Tensor:
        if self.config.proximal == "bypass":
            return sampler
        if self.config.proximal == "interpolate":
            return interpolated_proximal(inputs.proximal_logprobs, sampler, inputs.staleness)
        return inputs.proximal_logprobs.detach()

    def _kl_term(self, inputs: LossInputs, sampler: Tensor) -> Tensor:
        estimator = self.config.estimator
        if estimator == "full":
            if inputs.reference_kl is None:
                raise RecordError(_no_full_kl("the experience"))
            return inputs.reference_kl
        learner = inputs.learner_logprobs
        other = sampler if self.config.kl_to == "sampler" else inputs.ref_logprobs
        if other is None:
            raise RecordError(self._no_reference("the experience"))
        cap = token_cap(self.config.correction.rules())
        weights = learner.detach().new_ones(learner.shape)
        if cap is not None:
            weights = log_ratio(learner.detach(), sampler).exp().clamp(max=cap)
        return kl_loss(estimator, learner, other, weights)

    def _no_reference(self, where: str) -> str:
        return (
            f"algorithm.kl_coef = {self.config.kl_coef} but {where} has no ref_logprobs. "
            "Set scoring.reference = true"
        )

    # The loss itself: `loss`, `correct`, `weigh`

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """Return the loss of each token [N], not yet weighted by the aggregation, and metric sums.

        Raises:
            RecordError: shapes that differ, or reference or exact log-probabilities that are
                needed and missing.
        """
        learner, sampler = inputs.learner_logprobs, self._sampler(inputs)
        log_ratios, corrected = self.correct(sampler, inputs)
        losses, sums = self.surrogate(log_ratios, inputs)
        losses = scale_losses(losses, corrected.weights, self.config.proximal)
        sums = {
            **sums,
            **distance_sums(learner, inputs.sampled_logprobs.detach(), inputs.staleness),
            **correction_sums(corrected, inputs.staleness),
            **reference_sums(inputs),
        }
        if self.config.kl_active and self.config.kl_in == "loss":
            losses = losses + self.kl_coef * self._kl_term(inputs, sampler)
        if self.trains_entropy:
            losses = losses - self.config.entropy_coef * inputs.entropy
        return losses, sums

    def correct(self, sampler: Tensor, inputs: LossInputs) -> tuple[Tensor, ImportanceWeights]:
        """Return the log-ratios [N] that the surrogate sees, and the correction weight per token.

        With "recompute" and "interpolate" the weight is that of prox / mu by the rules. With "bypass"
        the surrogate's ratio is pi / mu itself: the rules mask by it, and what they truncate becomes
        a factor on the surrogate, so that the clip still sees the true ratio.
        """
        proximal = self._proximal(inputs, sampler)
        log_ratios = log_ratio(inputs.learner_logprobs, proximal)
        rules = self.config.correction.rules()
        bypass = self.config.proximal == "bypass"
        target = inputs.learner_logprobs if bypass else proximal
        weighed = weigh(rules, target, sampler, inputs.sequence, inputs.num_sequences)
        if not bypass:
            return log_ratios, weighed
        weights = (~weighed.masked).to(weighed.weights.dtype)
        bounds = [rule for rule in rules if rule.action == "truncate"]
        if bounds:
            # a truncated token keeps the gradient of log pi, also where `log_ratio` clamped
            learner = inputs.learner_logprobs
            log_ratios = log_ratios.detach() + (learner - learner.detach())
        for rule in bounds:
            ratio = log_ratios.detach().exp()
            weights = weights * self.truncation(ratio, rule.low, rule.high)
        return log_ratios, replace(weighed, weights=weights)


def scale_losses(losses: Tensor, weights: Tensor, proximal: Proximal) -> Tensor:
    """Weigh the loss of each token. [N], [N] -> [N].

    With "bypass" a weight above 1 is low / r: it lifts the gradient of a token to the lower bound.
    Where the surrogate is flat (a clip, SAPO's gate at a small r) its value does not shrink with r, and
    low / r times it would be a number without meaning, up to e^20: the value stays the surrogate's own.
    """
    if proximal != "bypass":
        return losses * weights
    value = losses.detach()
    return value * weights.clamp(max=1) + weights * (losses - value)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportanceWeights:
    """Weight that the rules of a correction give each token. No gradient."""

    weights: Tensor  # [N]
    capped: Tensor  # [N] bool, the weight is not 0, and its ratio was moved to a bound
    masked: Tensor  # [N] bool, the weight is 0
    outside: Mapping[str, Tensor]  # by the rule's name, [N] bool, the ratio is off its band


def weigh(
    rules: Sequence[Rule],
    logprobs: Tensor,
    sampled_logprobs: Tensor,
    sequence: Tensor,
    num_sequences: int,
) -> ImportanceWeights:
    """Apply all rules to all tokens of a micro-batch; without rules each token weighs 1.

    The weight of a token is the product of the weights that the rules give it. It depends on the
    token's own rollout only, so splitting a step into micro-batches of complete rollouts changes
    nothing. Log-ratios are clamped to [-20, 20], sums of them too, so weights and their squares are
    finite for any finite log-probabilities and any length.

    Args:
        rules: see `off_policy_correction`.
        logprobs: [N] of the policy that the weights lead to.
        sampled_logprobs: [N] of the sampler.
        sequence: [N] int64 in [0, num_sequences), the rollout of each token.
        num_sequences: rollouts in the micro-batch.

    Raises:
        RecordError: shapes that differ.
    """
    logs = log_ratio(logprobs.detach(), sampled_logprobs.detach())
    weights = logs.new_ones(logs.shape)
    capped = masked = logs.new_zeros(logs.shape).bool()
    outside = {}
    for rule in rules:
        ratio = level_log_ratios(rule.level, logs, sequence, num_sequences).exp()
        off = outside[rule.name] = (ratio < rule.low) | (ratio > rule.high)
        if rule.action == "truncate":
            weights, capped = weights * ratio.clamp(rule.low, rule.high), capped | off
        else:
            weights, masked = weights * ratio if rule.keep_ratio else weights, masked | off
    return ImportanceWeights(
        weights=weights.masked_fill(masked, 0.0),
        capped=capped & ~masked,
        masked=masked,
        outside=outside,
    )


def clipped_surrogate(
    log_ratios: Tensor, inputs: LossInputs, config: ClippedConfig
) -> tuple[Tensor, Sums]:
    """Return `policy_losses.clipped_policy_loss` of each token, and how many were clipped."""
    losses, clipped = clipped_policy_loss(
        log_ratios, inputs.advantages, config.clip_low, config.clip_high, config.dual_clip
    )
    return losses, {"learner/clip_fraction": (clipped.sum(), losses.new_tensor(losses.numel()))}


def reference_sums(inputs: LossInputs) -> Sums:
    """Return sums for the KL to the reference, per token and per response, if there is one."""
    kl = inputs.reference_kl
    if kl is None and inputs.ref_logprobs is not None:
        kl = k3(inputs.learner_logprobs, inputs.ref_logprobs)
    if kl is None:
        return {}
    reported = kl.detach().sum()
    return {
        "learner/kl_ref": (reported, reported.new_tensor(kl.numel())),
        "learner/kl_ref_response": (reported, reported.new_tensor(inputs.num_sequences)),
    }


def correction_sums(corrected: ImportanceWeights, staleness: Tensor) -> Sums:
    """Return sums for the shares of capped and masked tokens; with several rules, also by rule."""
    count = corrected.weights.new_tensor(corrected.weights.numel())
    shares = {"capped_fraction": corrected.capped, "masked_fraction": corrected.masked}
    sums = {
        **shares_by_staleness(shares, staleness),
        "importance/capped_fraction": (corrected.capped.sum(), count),
        "importance/masked_fraction": (corrected.masked.sum(), count),
    }
    if len(corrected.outside) > 1:
        for name, outside in corrected.outside.items():
            sums[f"importance/outside_fraction_by_rule/{name}"] = (outside.sum(), count)
    return sums


def _no_full_kl(where: str) -> str:
    return (
        f"algorithm.kl_estimator = 'full' but {where} has no reference_kl. The learner computes it "
        "where it holds the reference"
    )
