"""What the policy-gradient algorithms share: one loss, of which each algorithm fills in two parts.

For a token t with advantage A_t:

    loss_t = w_t surrogate(log pi_t - log prox_t, A_t) + kl_coef KL_t - entropy_coef H_t

    proximal = "recompute"     prox is the learner at the start of the step; w = prox / mu by the rule
    proximal = "interpolate"   prox lies between sampler and learner (`importance_weights`); w likewise
    proximal = "bypass"        prox = mu, the sampler: the ratio r of the surrogate IS the importance
                               weight. A token rule that truncates to [low, high] scales what the
                               surrogate lets through, w = sg(clip(r, low, high) / r), else w = 1; a
                               rule that masks masks tokens or rollouts, by pi / mu

where pi is the learner, mu the sampler, `correction` the rule (`importance_weights`), KL_t the term
of `kl` with the token's own weight, and H_t the entropy. With one optimizer step a batch the
recomputed prox IS pi: the ratio is exactly 1 in value, carries the gradient, and is never clipped;
w alone handles the distance to the sampler. In "bypass" the surrogate decides by the true ratio
(its clip, its gate, `dual_clip` of Ye et al. 2020, arXiv 1912.09729), and a token over the cap c
that it lets through is trained with the weight c: cutting its gradient would leave exactly the
tokens untrained of which the sampler saw too few. A cap before the surrogate would hide from it how
far the token is.

Promises: gradients flow into `learner_logprobs` (and the entropy) only; a token's loss depends on
its own rollout only. The three policies: Hilton et al. 2021, arXiv 2110.00641.

An algorithm subclasses `PolicyGradient` with `surrogate` and either `response_advantages` (one
number a response) or `advantages` (one a token), and its configuration `PolicyGradientConfig`.

Shapes: N trained tokens of a micro-batch, R rollouts of a step, T response tokens of a rollout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Generic, Literal, TypeVar

import numpy as np

from rlhf_cluster.algorithms.algorithm import (
    LossInputs,
    Sums,
)
from rlhf_cluster.algorithms.importance_weights import (
    Weighed,
    interpolated_proximal,
    log_ratio,
    token_cap,
    weigh,
)
from rlhf_cluster.algorithms.kl import KlController, k3, kl_loss, reward_penalty
from rlhf_cluster.algorithms.off_policy_distance import (
    derive_distance,
    distance_sums,
    shares_by_staleness,
)
from rlhf_cluster.algorithms.policy_gradient_config import (
    ClippedConfig,
    PolicyGradientConfig,
)
from rlhf_cluster.algorithms.policy_losses import Aggregation, clipped_policy_loss
from rlhf_cluster.errors import RecordError
from rlhf_cluster.records import ExperienceGroup, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor

C = TypeVar("C", bound=PolicyGradientConfig)


class PolicyGradient(ABC, Generic[C]):
    """Implements `algorithms.algorithm.Algorithm` but for `surrogate` and `response_advantages`."""

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
        """The coefficient of the KL term in the step that is next or under way."""
        return self._kl.coef

    @abstractmethod
    def surrogate(self, log_ratios: Tensor, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """The policy loss of each token [N] without its correction weight, and metric sums.

        Args:
            log_ratios: [N] log pi - log prox, carries the gradient.
            inputs: the micro-batch that they are of.
        """

    def response_reward(self, scored: ScoredRollout) -> float:
        """What `response_advantages` sees of a rollout, before the KL penalty."""
        return scored.reward

    def response_advantages(self, rewards: np.ndarray, group_ids: Sequence[Hashable]) -> np.ndarray:
        """[R] float64 rewards, less their KL penalty, and [R] group ids -> [R]."""
        raise NotImplementedError(f"{type(self).__name__} gives advantages a token, not a response")

    def advantages(self, groups: Sequence[ExperienceGroup]) -> list[list[np.ndarray]]:
        """One float32 array [T] per rollout, nested like `groups[i].scored[j]`.

        Every token of a response has the response's advantage. Groups that share an id are one.

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
        """The same groups, with the masks of rollouts cleared that are left out of the loss."""
        return groups

    def token_penalties(self, scored: ScoredRollout) -> np.ndarray:
        """What the KL takes off the reward at each token, times the coefficient: [T] float64."""
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

    def loss(self, inputs: LossInputs) -> tuple[Tensor, Sums]:
        """The loss of each token [N], not yet weighted by the aggregation, and metric sums.

        Raises:
            RecordError: shapes that differ, or reference or exact log-probabilities that are
                needed and not there.
        """
        learner, sampler = inputs.learner_logprobs, self._sampler(inputs)
        log_ratios, weighed = self._correct(sampler, inputs)
        losses, sums = self.surrogate(log_ratios, inputs)
        losses = losses * weighed.weights
        sums = {
            **sums,
            **distance_sums(learner, inputs.sampled_logprobs.detach(), inputs.staleness),
            **correction_sums(weighed, inputs.staleness),
            **reference_sums(inputs),
        }
        if self.config.kl_active and self.config.kl_in == "loss":
            losses = losses + self.kl_coef * self._kl_term(inputs, sampler)
        if self.trains_entropy:
            losses = losses - self.config.entropy_coef * inputs.entropy
        return losses, sums

    def correction_weights(self, inputs: LossInputs) -> Tensor:
        """What the sampler's distance weighs each token with, [N], without gradient: w, and with
        `proximal = "bypass"` the ratio to the sampler within the bounds of the correction, before the
        surrogate's own clip. 0 for what the correction masks.

        Raises:
            RecordError: as `loss`.
        """
        log_ratios, weighed = self._correct(self._sampler(inputs), inputs)
        if self.config.proximal != "bypass":
            return weighed.weights
        ratios = self.shared(log_ratios, inputs).detach().exp()
        for rule in self.config.correction.rules():
            if rule.action == "truncate":
                ratios = ratios.clamp(rule.low, rule.high)
        return ratios.masked_fill(weighed.masked, 0.0)

    def shared(self, log_ratios: Tensor, inputs: LossInputs) -> Tensor:
        """The log-ratios [N] of which the surrogate forms its ratios: each token's own."""
        return log_ratios

    def derive(self, means: Mapping[str, float]) -> dict[str, float]:
        """The metrics to report, from the reduced ones: adds what is no mean of tokens."""
        found = derive_distance(means)
        return found | {"learner/kl_coef": self.kl_coef} if self.config.kl_active else found

    def finish_step(self, metrics: Mapping[str, float]) -> None:
        """A step ended with these metrics, the same on every rank: moves the KL coefficient."""
        self._kl.update(
            metrics.get("learner/kl_ref_response"), int(metrics.get("learner/rollouts", 0))
        )

    def state(self) -> dict[str, float]:
        """What a checkpoint must keep of the algorithm."""
        return self._kl.state()

    def load_state(self, state: Mapping[str, float]) -> None:
        """Go on from `state()`."""
        self._kl.load_state(dict(state))

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

    def _correct(self, sampler: Tensor, inputs: LossInputs) -> tuple[Tensor, Weighed]:
        """The ratios as the surrogate sees them, and the weights of tokens."""
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
            # beyond the clamp of the log-ratio too, a truncated token keeps the gradient of log pi
            own = inputs.learner_logprobs
            log_ratios = log_ratios.detach() + (own - own.detach())
        for rule in bounds:
            ratio = log_ratios.detach().exp()
            weights = weights * self.truncation(ratio, rule.low, rule.high)
        return log_ratios, replace(weighed, weights=weights)

    def truncation(self, ratios: Tensor, low: float, high: float) -> Tensor:
        """What brings weights of these ratios [N] to the bounds, as a factor of their losses."""
        return ratios.clamp(low, high) / ratios

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


def _no_full_kl(where: str) -> str:
    return (
        f"algorithm.kl_estimator = 'full' but {where} has no reference_kl. The learner computes it "
        "where it holds the reference"
    )


def reference_sums(inputs: LossInputs) -> Sums:
    """The KL to the reference, of a token and of a response, where there is a reference."""
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


def correction_sums(weighed: Weighed, staleness: Tensor) -> Sums:
    """What the correction did to the tokens, and, where it has several rules, each of them alone."""
    count = weighed.weights.new_tensor(weighed.weights.numel())
    shares = {"capped_fraction": weighed.capped, "masked_fraction": weighed.masked}
    sums = {
        **shares_by_staleness(shares, staleness),
        "importance/capped_fraction": (weighed.capped.sum(), count),
        "importance/masked_fraction": (weighed.masked.sum(), count),
    }
    if len(weighed.outside) > 1:
        for name, outside in weighed.outside.items():
            sums[f"importance/outside_fraction_by_rule/{name}"] = (outside.sum(), count)
    return sums


def clipped_surrogate(
    log_ratios: Tensor, inputs: LossInputs, config: ClippedConfig
) -> tuple[Tensor, Sums]:
    """The objective of `policy_losses.clipped_policy_loss`, and how many tokens were clipped."""
    losses, clipped = clipped_policy_loss(
        log_ratios, inputs.advantages, config.clip_low, config.clip_high, config.dual_clip
    )
    return losses, {"learner/clip_fraction": (clipped.sum(), losses.new_tensor(losses.numel()))}
