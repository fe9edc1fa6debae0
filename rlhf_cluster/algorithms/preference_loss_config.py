"""Preference losses as sections of a run file: `loss = { type = "...", ... }`.

Each is an entry of `PREFERENCE_LOSSES`. Formulas and sources are in `algorithms.preference_losses`.

    dpo, and with label_smoothing cDPO, with nll_coef RPO      ipo    dpop    robust_dpo
    simpo, orpo                   no reference, so no forward pass of one
    kto                           single responses with a verdict instead of pairs

Promises: a loss is one value per pair (or labelled response), and metrics are (sum, count), so both add
over micro-batches and ranks; the caller divides by the pairs of the whole optimizer step. Importing
this loads no torch.

Shapes: P pairs, N single responses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PositiveFloat

from rlhf_cluster.algorithms import preference_losses
from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.preference_losses import Divergence, Labelled, Pairs
from rlhf_cluster.sections.extensions import FromOtherPackages, Table
from rlhf_cluster.sections.section import Section

if TYPE_CHECKING:
    from torch import Tensor


class PairLoss(Section):
    """Keys of every loss of pairs."""

    needs_reference: ClassVar[bool] = True
    paired: ClassVar[bool] = True

    nll_coef: float = Field(default=0.0, ge=0)
    """Weight of the chosen response's negative log-likelihood, a mean over its tokens. It keeps the
    chosen response likely, which the loss alone may not."""

    def objective(self, pairs: Pairs) -> Tensor:
        """Return the loss of each pair [P] without the likelihood term."""
        raise NotImplementedError

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Return implicit rewards of the chosen and of the rejected responses, [P] each."""
        raise NotImplementedError

    def losses(self, pairs: Pairs) -> tuple[Tensor, Sums]:
        """Return (loss of each pair [P], metric sums)."""
        losses = self.objective(pairs)
        if self.nll_coef > 0:
            losses = losses + self.nll_coef * preference_losses.nll(pairs)
        return losses, pair_metrics(pairs, losses, *self.rewards(pairs))


class _AgainstReference(PairLoss):
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference: the smaller, the further the policy may go."""

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.log_ratios
        return self.beta * chosen, self.beta * rejected


class DpoConfig(_AgainstReference):
    """Direct preference optimisation with its divergences; two keys make it cDPO or RPO."""

    type: Literal["dpo"] = "dpo"
    divergence: Divergence = "reverse_kl"
    """Divergence that ties the policy to the reference. `reverse_kl` is DPO as published."""
    alpha: float = Field(default=0.5, gt=0, lt=1)
    """Parameter of divergence = "alpha": near 0 it is reverse_kl, near 1 forward_kl."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose labels are swapped (cDPO)."""

    def objective(self, pairs: Pairs) -> Tensor:
        return preference_losses.dpo_loss(
            pairs, self.beta, self.divergence, self.alpha, self.label_smoothing
        )


class RobustDpoConfig(_AgainstReference):
    """DPO whose mean over randomly flipped labels is DPO on the correct labels."""

    type: Literal["robust_dpo"] = "robust_dpo"
    flip_probability: float = Field(default=0.1, ge=0, lt=0.5)
    """Share of labels that are flipped in the data."""

    def objective(self, pairs: Pairs) -> Tensor:
        return preference_losses.robust_dpo_loss(pairs, self.beta, self.flip_probability)


class IpoConfig(_AgainstReference):
    """Squared distance to a margin of 1 / (2 beta), instead of an unbounded margin."""

    type: Literal["ipo"] = "ipo"
    per_token: bool = True
    """Whether to divide each log-ratio by the response's length before taking the margin."""

    def objective(self, pairs: Pairs) -> Tensor:
        return preference_losses.ipo_loss(pairs, self.beta, self.per_token)


class DpopConfig(_AgainstReference):
    """DPO with a penalty on chosen responses that are less likely than under the reference."""

    type: Literal["dpop"] = "dpop"
    penalty: PositiveFloat = 50.0
    """Weight of the shortfall: nats of margin per nat of shortfall."""

    def objective(self, pairs: Pairs) -> Tensor:
        return preference_losses.dpop_loss(pairs, self.beta, self.penalty)


class SimpoConfig(PairLoss):
    """Mean log-probabilities per token with a margin, without a reference."""

    needs_reference: ClassVar[bool] = False

    type: Literal["simpo"] = "simpo"
    beta: PositiveFloat = 2.0
    """Factor of the difference between the mean log-probabilities per token."""
    gamma: float = Field(default=1.0, ge=0)
    """Margin, after scaling by beta."""

    def objective(self, pairs: Pairs) -> Tensor:
        return preference_losses.simpo_loss(pairs, self.beta, self.gamma)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.means
        return self.beta * chosen, self.beta * rejected


class OrpoConfig(PairLoss):
    """Supervised fine-tuning on the chosen response and an odds ratio, without a reference."""

    needs_reference: ClassVar[bool] = False

    type: Literal["orpo"] = "orpo"
    odds_coef: PositiveFloat = 0.1
    """Weight of the odds ratio."""
    nll_coef: float = Field(default=1.0, gt=0)
    """Weight of the chosen response's negative log-likelihood, a mean over its tokens."""

    def objective(self, pairs: Pairs) -> Tensor:
        return self.odds_coef * preference_losses.odds_loss(pairs)

    def rewards(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        chosen, rejected = pairs.means
        return self.odds_coef * chosen, self.odds_coef * rejected


class KtoConfig(Section):
    """Single responses, each labelled desirable or not, against a KL baseline."""

    needs_reference: ClassVar[bool] = True
    paired: ClassVar[bool] = False

    type: Literal["kto"] = "kto"
    beta: PositiveFloat = 0.1
    """Strength of the tie to the reference."""
    desirable_weight: PositiveFloat = 1.0
    """Weight of desirable responses. Keep (desirable_weight times desirable examples) / (
    undesirable_weight times the others) between 1 and 4/3."""
    undesirable_weight: PositiveFloat = 1.0
    """Weight of undesirable responses."""

    def losses(self, labelled: Labelled, baseline: Tensor) -> tuple[Tensor, Sums]:
        """Return (loss of each response [N], metric sums); `baseline` is
        `preference_losses.kto_baseline` of the whole optimizer step."""
        losses = preference_losses.kto_loss(
            labelled, baseline, self.beta, self.desirable_weight, self.undesirable_weight
        )
        return losses, labelled_metrics(labelled, losses, baseline, self.beta)


_BUILT_IN: dict[str, type[PairLoss] | type[KtoConfig]] = {
    "dpo": DpoConfig,
    "dpop": DpopConfig,
    "ipo": IpoConfig,
    "kto": KtoConfig,
    "orpo": OrpoConfig,
    "robust_dpo": RobustDpoConfig,
    "simpo": SimpoConfig,
}
PREFERENCE_LOSSES = Table("preference loss", "rlhf_cluster.preference_losses", _BUILT_IN, PairLoss)

PreferenceLoss = Annotated[
    DpoConfig | DpopConfig | IpoConfig | KtoConfig | OrpoConfig | RobustDpoConfig | SimpoConfig,
    Field(discriminator="type"),
    FromOtherPackages(PREFERENCE_LOSSES),
]


def pair_metrics(
    pairs: Pairs, losses: Tensor, chosen_rewards: Tensor, rejected_rewards: Tensor
) -> Sums:
    """Return metric sums of pairs. Equal rewards are half right: the initial policy has accuracy 0.5.

    Log-probabilities are those of whole responses in nats. Both are reported, because a margin can
    grow while both fall.
    """
    count = losses.new_tensor(losses.numel())
    margins = chosen_rewards - rejected_rewards
    right = (margins > 0).to(losses.dtype) + (margins == 0).to(losses.dtype) / 2
    sums = {
        "preference/loss": losses,
        "preference/chosen_logprob": pairs.chosen,
        "preference/rejected_logprob": pairs.rejected,
        "preference/margin": margins,
        "preference/accuracy": right,
    }
    if pairs.ref_chosen is not None:
        chosen, rejected = pairs.log_ratios
        sums |= {
            "preference/chosen_log_ratio": chosen,
            "preference/rejected_log_ratio": rejected,
            "preference/chosen_fell_fraction": (chosen < 0).to(losses.dtype),
        }
    return {name: (values.sum(), count) for name, values in sums.items()}


def labelled_metrics(labelled: Labelled, losses: Tensor, baseline: Tensor, beta: float) -> Sums:
    """Return metric sums of responses; accuracy is the share on the right side of the baseline."""
    ratios = labelled.log_ratios
    desirable = labelled.desirable.bool()
    signed = (ratios - baseline).where(desirable, baseline - ratios)
    right = (signed > 0).to(losses.dtype) + (signed == 0).to(losses.dtype) / 2
    count = losses.new_tensor(losses.numel())
    good, bad = desirable.to(losses.dtype), (~desirable).to(losses.dtype)
    return {
        "preference/loss": (losses.sum(), count),
        "preference/margin": (beta * signed.sum(), count),
        "preference/accuracy": (right.sum(), count),
        "preference/kl_baseline": (baseline * count, count),
        "preference/chosen_logprob": ((labelled.policy * good).sum(), good.sum()),
        "preference/rejected_logprob": ((labelled.policy * bad).sum(), bad.sum()),
        "preference/chosen_log_ratio": ((ratios * good).sum(), good.sum()),
        "preference/rejected_log_ratio": ((ratios * bad).sum(), bad.sum()),
        "preference/chosen_fell_fraction": (((ratios < 0) * good).sum(), good.sum()),
    }
