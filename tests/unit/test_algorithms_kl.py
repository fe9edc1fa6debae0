"""KL estimators: values against exact sums, and the gradients that a loss would follow."""

import torch

from rlhf_cluster.algorithms.kl import k1, k2, k3, kl_loss

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 0.2, -0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)


def _expected_gradient(estimator: object) -> torch.Tensor:
    """Gradient at the logits of the estimator, in expectation over tokens sampled from the policy.

    The sampling probabilities carry no gradient: they are where the tokens came from.
    """
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    (policy.exp().detach() * estimator(policy, REFERENCE)).sum().backward()  # type: ignore[operator]
    assert logits.grad is not None
    return logits.grad


def _kl_gradient(forward: bool) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    p, q = (REFERENCE, policy) if forward else (policy, REFERENCE)
    (p.exp() * (p - q)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def test_k1_and_k3_are_unbiased_estimators_of_the_divergence() -> None:
    policy = LOGITS.log_softmax(0)
    exact = (policy.exp() * (policy - REFERENCE)).sum()
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, REFERENCE)).sum(), exact)
    assert (k3(policy, REFERENCE) >= 0).all()
    torch.testing.assert_close(k3(policy, policy), torch.zeros(5, dtype=torch.float64))


def test_s8_k1_in_a_loss_has_no_force() -> None:
    torch.testing.assert_close(_expected_gradient(k1), torch.zeros(5, dtype=torch.float64))


def test_s8_k3_in_a_loss_descends_the_other_direction() -> None:
    torch.testing.assert_close(_expected_gradient(k3), _kl_gradient(forward=True))


def test_s8_the_loss_has_the_gradient_of_the_divergence_from_the_policy() -> None:
    torch.testing.assert_close(_expected_gradient(kl_loss), _kl_gradient(forward=False))
    torch.testing.assert_close(_expected_gradient(k2), _kl_gradient(forward=False))


def test_s8_the_gradient_agrees_with_finite_differences_and_lowers_the_divergence() -> None:
    def divergence(logits: torch.Tensor) -> torch.Tensor:
        policy = logits.log_softmax(0)
        return (policy.exp() * (policy - REFERENCE)).sum()

    gradient, step = _expected_gradient(kl_loss), 1e-6
    for index in range(5):
        moved = LOGITS.clone()
        moved[index] += step
        difference = (divergence(moved) - divergence(LOGITS)) / step
        torch.testing.assert_close(difference, gradient[index], atol=1e-5, rtol=1e-4)
    assert divergence(LOGITS - 0.1 * gradient) < divergence(LOGITS)


def test_k3_is_finite_for_any_finite_logprobs() -> None:
    far = k3(torch.tensor([-200.0, 0.0]), torch.tensor([0.0, -200.0]))
    assert torch.isfinite(far).all()
