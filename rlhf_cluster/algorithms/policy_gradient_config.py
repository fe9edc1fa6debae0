"""Configuration that algorithms share, and the combinations of keys that it refuses.

The formulas are in `policy_gradient`, `importance_weights`, `off_policy_correction` and `kl`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from rlhf_cluster.algorithms.kl import Estimator, FixedKl, KlControl, LinearKl
from rlhf_cluster.algorithms.off_policy_correction import Correction, TokenTis
from rlhf_cluster.algorithms.policy_losses import Aggregation
from rlhf_cluster.sections.section import Section

Proximal = Literal["recompute", "interpolate", "bypass"]


class AlgorithmSection(Section):
    """Keys and properties that the rest of a run reads of every algorithm's section."""

    group_size: int = Field(default=8, ge=1)
    """Rollouts of one prompt."""

    def trains_on(self, rewards: Sequence[float]) -> bool:
        """Return whether to train on a group with these rewards; if not, another replaces it."""
        return True

    @property
    def unit_size(self) -> int:
        """Rollouts of a group that stay in one micro-batch, because the loss compares them."""
        return 1

    @property
    def no_steps(self) -> str | None:
        """Reason why this algorithm cannot use rewards of reasoning steps, or None if it can."""
        return "it gives every token of a response the same advantage"

    @property
    def full_kl_in(self) -> Literal["loss", "reward"] | None:
        """Term that the KL over the whole vocabulary acts in; None if it is not used."""
        return None

    @property
    def needs_reference(self) -> bool:
        """The scoring pool has to serve the reference."""
        return False

    @property
    def needs_teacher(self) -> bool:
        """Whether the scoring pool has to serve a teacher."""
        return False


class PolicyGradientConfig(AlgorithmSection):
    """Keys of every policy-gradient algorithm."""

    aggregation: Aggregation = "token_mean"
    """Weights of token losses in the loss of a step; see `algorithms.policy_losses`."""
    proximal: Proximal = "recompute"
    """Denominator of the ratio. `recompute`: the learner at the start of the step; `correction` weights
    the distance to the sampler. `interpolate`: the same without an extra forward pass (A-3PO).
    `bypass`: the sampler itself, truncated or masked by `correction`."""
    correction: Correction = TokenTis()
    """Weighting or masking of tokens whose sampler is not the trained policy; see
    `algorithms.off_policy_correction`. The weights of a list of rules multiply."""
    sampler: Literal["sampled", "exact"] = "sampled"
    """Log-probabilities of the sampler mu. `sampled`: those of the engine. `exact`: those that the
    learner's code computes with the same weights, so that ratios contain staleness and no engine
    mismatch; needs `scoring.exact_logprobs = true`."""
    entropy_coef: float = Field(default=0.0, ge=0)
    """Weight of the entropy bonus."""
    kl_coef: float = Field(default=0.0, ge=0)
    """Weight of the KL term at the start; `kl_to = "reference"` needs `scoring.reference = true`, or
    `kl_estimator = "full"`."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Term that the KL is added to: each token's loss, or the reward before advantages."""
    kl_estimator: Estimator | None = None
    """Estimator, see `algorithms.kl`; default: k2 in the loss, k1 in the reward. `full` is not an
    estimate but the KL over the whole vocabulary; the learner then holds the reference and passes
    every batch through it."""
    kl_to: Literal["reference", "sampler"] = "reference"
    """Policy that the KL is measured to."""
    kl_control: KlControl = FixedKl()
    """Change of the coefficient over the run."""

    @property
    def kl_active(self) -> bool:
        """Whether the coefficient is, or may become, greater than 0."""
        control = self.kl_control
        return self.kl_coef > 0 or (isinstance(control, LinearKl) and control.final > 0)

    @property
    def full_kl_in(self) -> Literal["loss", "reward"] | None:
        return self.kl_in if self.kl_active and self.estimator == "full" else None

    @property
    def needs_reference(self) -> bool:
        return self.kl_active and self.kl_to == "reference" and self.full_kl_in is None

    @property
    def estimator(self) -> Estimator:
        return self.kl_estimator or ("k2" if self.kl_in == "loss" else "k1")

    @property
    def correction_key(self) -> str:
        """Key and type of the correction for error messages, marked if the run file leaves it out."""
        given = "" if "correction" in self.model_fields_set else " (the default)"
        return f"correction.type = {self.correction.type!r}{given}"

    @model_validator(mode="after")
    def _keys_agree(self) -> PolicyGradientConfig:
        for problem in (self._correction_problem(), self._kl_problem()):
            if problem is not None:
                raise ValueError(problem)
        return self

    def _correction_problem(self) -> str | None:
        rules, name = self.correction.rules(), self.correction_key
        actions = {rule.action for rule in rules if rule.level != "token"}
        if "truncate" in actions and self.proximal == "bypass":
            return (
                f"{name} with proximal = 'bypass': the ratio against the sampler is the weight "
                "already, and a rollout's weight on top would count it twice. Set correction = "
                "{ type = 'none' }, or a rule that masks, or proximal = 'recompute'"
            )
        if "mask" in actions and self.group_size == 1:
            return (
                f"{name} with group_size = 1: a masked rollout takes its whole prompt out of the "
                "batch, so prompts with long answers vanish. Use a token rule, or larger groups"
            )
        return None

    def _kl_problem(self) -> str | None:
        if self.kl_control.type == "adaptive" and self.kl_coef == 0:
            return (
                "kl_control.type = 'adaptive' with kl_coef = 0: the coefficient is multiplied and "
                "would stay 0. Set kl_coef to a start value, such as 0.01"
            )
        if self.kl_control.type == "adaptive" and self.kl_to == "sampler":
            return (
                "kl_control.type = 'adaptive' with kl_to = 'sampler': the target is of the KL to "
                "the reference. Use kl_control.type = 'fixed' or 'linear'"
            )
        if self.kl_in == "reward" and self.kl_to == "sampler":
            return (
                "kl_in = 'reward' with kl_to = 'sampler': the record's log-probabilities are the "
                "sampler's, so the penalty is always 0. Use kl_in = 'loss'"
            )
        if self.kl_estimator == "full" and self.kl_to == "sampler":
            return (
                "kl_estimator = 'full' with kl_to = 'sampler': the sampler's whole distributions are "
                "not recorded. Use kl_to = 'reference', or an estimator such as 'k2'"
            )
        if self.kl_in == "reward" and self.kl_estimator == "k3_direct":
            return (
                "kl_estimator = 'k3_direct' with kl_in = 'reward': it says how a loss is "
                "differentiated. Use 'k1'"
            )
        return None


class ClippedConfig(PolicyGradientConfig):
    """Keys of algorithms with the clipped surrogate."""

    clip_low: float = Field(default=0.2, gt=0, lt=1)
    """Distance from 1 to the lower bound of the ratio."""
    clip_high: float = Field(default=0.28, gt=0)
    """Bounds of the ratio: [1 - clip_low, 1 + clip_high]."""
    dual_clip: float | None = Field(default=None, gt=1)
    """Bound of the loss where A is negative, as a multiple of |A|; default: no bound."""
