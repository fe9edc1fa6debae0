"""Preference losses: pure functions from log-probabilities of whole responses to a loss per pair.

With w the chosen and l the rejected response, pi the policy, ref the frozen reference,
r = log pi(y) - log ref(y), m = log pi(y) / |y| (a mean over tokens), s = log sigmoid:

    dpo       -(1 - e) s(beta h) - e s(-beta h)           h = g(r_w) - g(r_l); e > 0 is cDPO
    robust    (-(1 - e) s(beta h) + e s(-beta h)) / (1 - 2 e)
    ipo       (h - 1 / (2 beta))^2                        h = r_w - r_l, or of r / |y|
    dpop      -s(beta (r_w - r_l - penalty max(0, -r_w)))
    simpo     -s(beta (m_w - m_l) - gamma)
    odds      -s(o_w - o_l)                               o = m - log(1 - exp m); with NLL it is ORPO
    kto       lambda_d (1 - sigmoid(beta (r - z))) where desirable, else
              lambda_u (1 - sigmoid(beta (z - r)))        z the KL baseline of the whole step
    nll       -m_w                                        with dpo it is RPO

    g(r)      reverse_kl r,  forward_kl -exp(-r),  js s(r),  alpha (1 - exp(-alpha r)) / alpha

Promises: one loss per pair, neither weighted nor summed, so that a caller's sum does not depend on
micro-batches; shapes are checked, nothing broadcasts; no gradient flows into the reference or into z;
finite for any finite input: beyond `MAX_LOG_RATIO` an exponential continues as its tangent. Where
policy and reference agree, each loss over r has the gradient of its formula, not 0.

Shapes: P pairs, N single responses, M unmatched responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_cluster.errors import RecordError

if TYPE_CHECKING:
    from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

MAX_LOG_RATIO = 20.0
"""Bound above which an exponential is its tangent; e^20 times usual coefficients is finite."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairs:
    """Log-probabilities of both responses of each pair, summed over their tokens; float32 or 64."""

    chosen: Tensor  # [P] carries the gradient
    rejected: Tensor  # [P] carries the gradient
    chosen_tokens: Tensor  # [P] number of summed tokens, at least 1
    rejected_tokens: Tensor  # [P]
    ref_chosen: Tensor | None = None  # [P] of the frozen reference
    ref_rejected: Tensor | None = None  # [P]

    def __post_init__(self) -> None:
        _one_shape(
            chosen=self.chosen,
            rejected=self.rejected,
            chosen_tokens=self.chosen_tokens,
            rejected_tokens=self.rejected_tokens,
            ref_chosen=self.ref_chosen,
            ref_rejected=self.ref_rejected,
        )

    @property
    def log_ratios(self) -> tuple[Tensor, Tensor]:
        """r of the chosen and of the rejected responses, [P] each.

        Raises:
            RecordError: the pairs have no reference.
        """
        if self.ref_chosen is None or self.ref_rejected is None:
            raise RecordError(
                "this preference loss compares with a reference, and the pairs have no log-"
                "probabilities of one. Compute them first"
            )
        return self.chosen - self.ref_chosen.detach(), self.rejected - self.ref_rejected.detach()

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """m of the chosen and of the rejected responses, [P] each: means over tokens."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Labelled:
    """Log-probabilities of single responses, each with a label, summed over their tokens."""

    policy: Tensor  # [N] carries the gradient
    ref: Tensor  # [N] of the frozen reference
    desirable: Tensor  # [N] bool

    def __post_init__(self) -> None:
        _one_shape(policy=self.policy, ref=self.ref, desirable=self.desirable)

    @property
    def log_ratios(self) -> Tensor:
        return self.policy - self.ref.detach()


def link(log_ratios: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """Return g(r): f'(pi / ref) of the f-divergence to the reference, up to a constant that cancels.

    Wang et al. 2023, arXiv 2309.16240. `alpha` goes to 0 at reverse_kl, and is forward_kl at 1.

    Args:
        log_ratios: any shape, carries the gradient.
    """
    if divergence == "reverse_kl":
        return log_ratios
    if divergence == "forward_kl":
        return -_exp(-log_ratios)
    if divergence == "js":
        return _log_sigmoid(log_ratios)
    return (1 - _exp(-alpha * log_ratios)) / alpha


def dpo_loss(
    pairs: Pairs,
    beta: float,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return DPO [P]. Rafailov et al. 2023, arXiv 2305.18290; divergences: arXiv 2309.16240.

    `label_smoothing` e is the assumed share of pairs whose labels are swapped (cDPO, Mitchell 2023,
    "A note on DPO with noisy preferences"): it makes the best margin finite.
    """
    logits = beta * _margin(pairs, divergence, alpha)
    right, flipped = _log_sigmoid(logits), _log_sigmoid(-logits)
    return -(1 - label_smoothing) * right - label_smoothing * flipped


def robust_dpo_loss(pairs: Pairs, beta: float, flip_probability: float) -> Tensor:
    """Return robust DPO [P]: its mean over flipped labels is the DPO loss of the correct labels.

    Chowdhury et al. 2024, arXiv 2403.00409. `flip_probability` in [0, 0.5). Not bounded below.
    """
    logits = beta * _margin(pairs, "reverse_kl", 0.5)
    right, flipped = _log_sigmoid(logits), _log_sigmoid(-logits)
    unbiased = -(1 - flip_probability) * right + flip_probability * flipped
    return unbiased / (1 - 2 * flip_probability)


def ipo_loss(pairs: Pairs, beta: float, per_token: bool) -> Tensor:
    """Return IPO [P], the squared distance to the margin 1 / (2 beta). arXiv 2310.12036, eq. 17.

    Azar et al. 2023. `per_token` first divides each log-ratio by its response's length, as its authors
    did for the results of the paper; else the target is the same number of nats for a line and a
    page.
    """
    chosen, rejected = pairs.log_ratios
    if per_token:
        chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
    return (chosen - rejected - 1 / (2 * beta)).square()


def dpop_loss(pairs: Pairs, beta: float, penalty: float) -> Tensor:
    """Return DPOP [P]: DPO with a penalty on chosen responses less likely than under the reference.

    Pal et al. 2024, arXiv 2402.13228 (Smaug), `penalty` is its lambda.
    """
    chosen, rejected = pairs.log_ratios
    return -_log_sigmoid(beta * (chosen - rejected - penalty * (-chosen).relu()))


def simpo_loss(pairs: Pairs, beta: float, gamma: float) -> Tensor:
    """Return SimPO [P]: no reference, means over tokens. Meng et al. 2024, arXiv 2405.14734."""
    chosen, rejected = pairs.means
    return -_log_sigmoid(beta * (chosen - rejected) - gamma)


def odds_loss(pairs: Pairs) -> Tensor:
    """Return the odds-ratio part of ORPO [P], no reference. Hong et al. 2024, arXiv 2403.07691."""
    chosen, rejected = (mean - _log_1m_exp(mean) for mean in pairs.means)
    return -_log_sigmoid(chosen - rejected)


def nll(pairs: Pairs) -> Tensor:
    """Return the negative log-likelihood of the chosen response [P], a mean over its tokens.

    Added to DPO it is RPO: Pang et al. 2024, arXiv 2404.19733; Liu et al. 2024, arXiv 2405.16436.
    Added to the odds ratio it is ORPO.
    """
    return -pairs.means[0]


def kto_baseline(policy: Tensor, ref: Tensor) -> Tensor:
    """Return z, a scalar: the policy's KL to the reference, estimated on responses of OTHER prompts.

    z = max(0, mean of log pi(y'|x) - log ref(y'|x)) over all unmatched responses of the optimizer
    step, on all ranks; without gradient. Ethayarajh et al. 2024, arXiv 2402.01306.

    Args:
        policy: [M] log-probability of a response after a prompt that it does not belong to.
        ref: [M] log-probability of the same response under the reference.

    Raises:
        RecordError: shapes that differ, or none of them.
    """
    _one_shape(policy=policy, ref=ref)
    if policy.numel() == 0:
        raise RecordError("the KL baseline of KTO needs at least one unmatched response, found 0")
    return (policy - ref).detach().mean().clamp(min=0)


def kto_loss(
    labelled: Labelled,
    baseline: Tensor,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """Return KTO [N], which needs no pairs. Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8.

    Args:
        baseline: scalar of `kto_baseline`; its gradient is stopped.
        desirable_weight, undesirable_weight: with n_d and n_u examples, the paper advises
            desirable_weight n_d / (undesirable_weight n_u) in [1, 4/3].
    """
    if baseline.ndim != 0:
        raise RecordError(f"the baseline must be a scalar, found {list(baseline.shape)}")
    logits = beta * (labelled.log_ratios - baseline.detach())
    desirable = labelled.desirable.bool()
    losses = 1 - logits.where(desirable, -logits).sigmoid()
    return losses * (desirable * desirable_weight + ~desirable * undesirable_weight)


def _margin(pairs: Pairs, divergence: Divergence, alpha: float) -> Tensor:
    chosen, rejected = pairs.log_ratios
    return link(chosen, divergence, alpha) - link(rejected, divergence, alpha)


def _log_sigmoid(values: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid

    return logsigmoid(values)


def _exp(values: Tensor) -> Tensor:
    """Return e^x up to `MAX_LOG_RATIO` and its tangent beyond: finite, with a gradient everywhere."""
    bounded = values.clamp(max=MAX_LOG_RATIO)
    return bounded.exp() * (1 + values - bounded)


def _log_1m_exp(means: Tensor) -> Tensor:
    """Return log(1 - exp(m)) for m < 0 without cancellation; m = 0 is treated as -eps."""
    import torch

    means = means.clamp(max=-torch.finfo(means.dtype).eps)
    near = means > -0.6931
    # each branch gets a harmless value where the other one applies, so that no gradient is NaN
    near_means, far_means = means.where(near, -0.5), means.where(~near, -1.0)
    return (-near_means.expm1()).log().where(near, (-far_means.exp()).log1p())


def _one_shape(**tensors: Tensor | None) -> None:
    """Raise `RecordError` unless all are vectors of one length."""
    shapes = {name: list(t.shape) for name, t in tensors.items() if t is not None}
    if (
        len({tuple(shape) for shape in shapes.values()}) != 1
        or len(next(iter(shapes.values()))) != 1
    ):
        text = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise RecordError(f"all must be vectors of one length, an entry per response; found {text}")
