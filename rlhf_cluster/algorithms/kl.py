"""Per-token estimators of KL(policy || reference), and which of them may stand in a loss.

With d = log pi - log ref on tokens sampled from pi (Schulman 2020, "Approximating KL divergence"):

    k1 = d                      unbiased, noisy, can be negative
    k2 = d^2 / 2                biased, never negative
    k3 = exp(-d) - 1 + d        unbiased, never negative: the one to report

In a loss what counts is the gradient, which does not follow from the value:

    E[grad k1] = E[grad log pi] = 0            no force at all
    E[grad k2] = E[d grad log pi] = grad KL(pi || ref)      the right one
    E[grad k3] = grad KL(ref || pi)            the other direction

so `kl_loss` is k2. Samples from another policy need their importance weight on it.

Shapes: N tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound of -d inside an exponential; e^20 and its square are finite in float32."""


def k1(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N], [N] -> [N]. Not for a loss: its expected gradient is zero."""
    return policy_logprobs - ref_logprobs


def k2(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N], [N] -> [N]. Its expected gradient is that of KL(policy || reference)."""
    return (policy_logprobs - ref_logprobs).square() / 2


def k3(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N], [N] -> [N]. For reports; in a loss it would descend KL(reference || policy)."""
    difference = policy_logprobs - ref_logprobs
    return (-difference).clamp(max=MAX_LOG_RATIO).exp() - 1 + difference


def kl_loss(policy_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[N], [N] -> [N]. The estimator whose gradient pulls the policy towards the reference."""
    return k2(policy_logprobs, ref_logprobs.detach())
