"""KL terms: estimators per token, the two terms they may act in, and their coefficient over time.

With d = log pi - log q on tokens sampled from pi (Schulman 2020, "Approximating KL divergence"):

    k1 = d                      unbiased, noisy, can be negative
    k2 = d^2 / 2                biased, never negative
    k3 = exp(-d) - 1 + d        unbiased, never negative: the one to report

**In the loss** what counts is the gradient, which the value does not determine. Differentiated
directly, E[grad k1] = E[grad log pi] = 0: no force at all; E[grad k3] = grad KL(q || pi): the
other direction; E[grad k2] = grad KL(pi || q): the right one. The sampling distribution depends on
pi too, so an estimate of KL(pi || q) is ratio times k, differentiated as a product. `kl_loss`:

    k1          v exp(log pi - sg(log pi)) k1     gradient v (d + 1) grad log pi
    k2          v k2                              gradient v  d      grad log pi
    k3          v exp(log pi - sg(log pi)) k3     gradient v  d      grad log pi
    k3_direct   v k3                              gradient v (1 - exp(-d)) grad log pi

The first three descend KL(pi || q) (k1 with more noise, as E[grad log pi] = 0); k3_direct is what
GRPO publishes (arXiv 2402.03300) and descends KL(q || pi). v is the token's own importance weight.

**Over the vocabulary** (`full`) nothing is estimated: K_t = sum over the vocabulary of
pi (log pi - log q) at the position of token t, from the logits of both policies at the learner
(`models.logprobs`). In the loss it is differentiated directly, and needs no weight: it does not
depend on which token was sampled there.

**In the reward** a rollout's reward is lowered by coef times the sum of k over its tokens, before
advantages. The policy gradient of that with k1 is grad KL(pi || q). With k2 or k3 it is not: for k3
it is grad KL(pi || q) - grad KL(q || pi), zero where those agree (Liu et al. 2025, arXiv
2510.01555). K_t depends on the tokens BEFORE t alone, so in the reward it teaches them to lead where
pi and q agree, and has no force on the distribution at t itself. The gradient of a response's KL is
that part and the one in the loss together (Amini et al. 2025, arXiv 2504.10637).

Shapes: N tokens, T response tokens of one rollout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_cluster.errors import RecordError
from rlhf_cluster.sections.section import Section

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of -d in an exponential; e^20 and its square are finite in float32."""

SampledEstimator = Literal["k1", "k2", "k3", "k3_direct"]
Estimator = Literal[SampledEstimator, "full"]


class FixedKl(Section):
    """The coefficient stays `kl_coef`."""

    type: Literal["fixed"] = "fixed"


class AdaptiveKl(Section):
    """The coefficient steers the KL of a whole response towards a target.

    coef <- coef (1 + clip(KL / target - 1, -0.2, 0.2) min(rollouts / horizon, 1)) after each step.
    Ziegler et al. 2019, arXiv 1909.08593.
    """

    type: Literal["adaptive"] = "adaptive"
    target: PositiveFloat
    """Target KL in nats per response, such as 6."""
    horizon: PositiveInt = 10_000
    """Rollouts after which a deviation of 20 % has changed the coefficient by 20 %."""


class LinearKl(Section):
    """The coefficient changes linearly from `kl_coef` to `final` in `steps` steps."""

    type: Literal["linear"] = "linear"
    final: float = Field(ge=0)
    """Coefficient after `steps` steps, kept from there on. 0: no KL term."""
    steps: PositiveInt
    """Steps over which the coefficient changes."""


KlControl = Annotated[FixedKl | AdaptiveKl | LinearKl, Field(discriminator="type")]


class KlController:
    """Coefficient of the KL term, updated once per step. Its state is two numbers."""

    def __init__(self, coef: float, control: FixedKl | AdaptiveKl | LinearKl) -> None:
        self._start, self._control = coef, control
        self._coef, self._step = coef, 0

    @property
    def coef(self) -> float:
        return self._coef

    def update(self, kl: float | None, num_rollouts: int) -> None:
        """Update after a step. `kl` is in nats per response; None if unknown."""
        self._step += 1
        control = self._control
        if isinstance(control, LinearKl):
            done = min(self._step / control.steps, 1.0)
            self._coef = self._start + (control.final - self._start) * done
        elif isinstance(control, AdaptiveKl) and kl is not None:
            error = min(max(kl / control.target - 1, -0.2), 0.2)
            self._coef *= 1 + error * min(num_rollouts / control.horizon, 1.0)

    def state(self) -> dict[str, float]:
        """Return the state that a checkpoint must keep."""
        return {"kl_coef": self._coef, "kl_step": float(self._step)}

    def load_state(self, state: dict[str, float]) -> None:
        """Resume from `state()`; all later coefficients are those of an uninterrupted run."""
        self._coef, self._step = float(state["kl_coef"]), int(state["kl_step"])


def k1(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k1. [N], [N] -> [N]. Differentiated directly, its expected gradient is zero."""
    return policy_logprobs - ref_logprobs


def k2(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k2. [N], [N] -> [N]. Its expected gradient is that of KL(policy || reference)."""
    return (policy_logprobs - ref_logprobs).square() / 2


def k3(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return k3, to report. [N], [N] -> [N]. Differentiated directly it descends KL(ref || policy)."""
    difference = policy_logprobs - ref_logprobs
    return (-difference).clamp(max=MAX_LOG_RATIO).exp() - 1 + difference


def kl_loss(
    estimator: SampledEstimator, policy_logprobs: Tensor, ref_logprobs: Tensor, weights: Tensor
) -> Tensor:
    """Return the KL term of each token in a loss, not yet times its coefficient; see the module.

    Args:
        estimator: k1, k2, k3 (gradient of KL(policy || reference)), k3_direct (the other).
        policy_logprobs: [N], carries the gradient.
        ref_logprobs: [N] of the reference, or of the sampler.
        weights: [N] importance weights of the tokens.

    Raises:
        RecordError: shapes that differ.
    """
    if not policy_logprobs.shape == ref_logprobs.shape == weights.shape:
        raise RecordError(
            f"policy_logprobs {list(policy_logprobs.shape)}, ref_logprobs "
            f"{list(ref_logprobs.shape)} and weights {list(weights.shape)} must all be [N]"
        )
    ref_logprobs, weights = ref_logprobs.detach(), weights.detach()
    if estimator == "k2":
        return weights * k2(policy_logprobs, ref_logprobs)
    if estimator == "k3_direct":
        return weights * k3(policy_logprobs, ref_logprobs)
    score = weights * (policy_logprobs - policy_logprobs.detach()).exp()
    return score * (k1 if estimator == "k1" else k3)(policy_logprobs, ref_logprobs)


def reward_penalty(
    estimator: SampledEstimator,
    sampled_logprobs: np.ndarray,
    ref_logprobs: np.ndarray,
    mask: np.ndarray,
) -> np.ndarray:
    """Return each token's reduction of the reward, not yet times the coefficient: [T] float64.

    It uses the record only: sampler against reference, with the weights that sampled. 0 where `mask`
    is False. Stiennon et al. 2020, arXiv 2009.01325 (k1).

    Raises:
        RecordError: shapes that differ.
    """
    if not sampled_logprobs.shape == ref_logprobs.shape == mask.shape:
        raise RecordError(
            f"sampled_logprobs {list(sampled_logprobs.shape)}, ref_logprobs "
            f"{list(ref_logprobs.shape)} and mask {list(mask.shape)} must all be [T]"
        )
    difference = sampled_logprobs.astype(np.float64) - ref_logprobs.astype(np.float64)
    if estimator == "k1":
        values = difference
    elif estimator == "k2":
        values = np.square(difference) / 2
    else:
        values = np.exp(np.minimum(-difference, MAX_LOG_RATIO)) - 1 + difference
    return np.where(mask, values, 0.0)
