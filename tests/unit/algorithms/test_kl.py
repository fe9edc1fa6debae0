"""KL: values and gradients against exact sums over five actions; controllers against hand numbers."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms import Grpo, GrpoConfig
from rlhf_cluster.algorithms.kl import (
    AdaptiveKl,
    FixedKl,
    KlController,
    LinearKl,
    k1,
    k3,
    kl_loss,
    reward_penalty,
)
from rlhf_cluster.errors import RecordError
from tests.support.builders.tiny_learner import (
    loss_inputs,
    make_prompt,
    make_scored,
)

LOGITS = torch.tensor([0.3, -0.8, 1.1, 0.0, -0.2], dtype=torch.float64)
REFERENCE = torch.tensor([1.0, 0.2, -0.5, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
SAMPLER = torch.tensor([0.1, -0.3, 0.6, 0.2, 0.5], dtype=torch.float64).log_softmax(0)


def expected_gradient(term: Any, sampler: torch.Tensor | None = None) -> torch.Tensor:
    """Gradient at the logits of a term, in expectation over tokens of the sampler.

    The sampling probabilities carry no gradient: they are where the tokens came from.
    """
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    sampler = policy.detach() if sampler is None else sampler
    weights = (policy.detach() - sampler).exp()
    (sampler.exp() * term(policy, REFERENCE, weights)).sum().backward()
    assert logits.grad is not None
    return logits.grad


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return (p.exp() * (p - q)).sum()


def kl_gradient(forward: bool = False) -> torch.Tensor:
    logits = LOGITS.clone().requires_grad_()
    policy = logits.log_softmax(0)
    (divergence(REFERENCE, policy) if forward else divergence(policy, REFERENCE)).backward()
    assert logits.grad is not None
    return logits.grad


def test_k1_and_k3_are_unbiased_estimators_of_the_divergence() -> None:
    policy = LOGITS.log_softmax(0)
    exact = divergence(policy, REFERENCE)
    for estimator in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, REFERENCE)).sum(), exact)
    assert (k3(policy, REFERENCE) >= 0).all()
    torch.testing.assert_close(k3(policy, policy), torch.zeros(5, dtype=torch.float64))


def test_s8_k1_differentiated_as_it_stands_has_no_force() -> None:
    found = expected_gradient(lambda p, q, w: k1(p, q))
    torch.testing.assert_close(found, torch.zeros(5, dtype=torch.float64))


def test_s8_k3_differentiated_as_it_stands_descends_the_other_direction() -> None:
    for found in (
        expected_gradient(lambda p, q, w: k3(p, q)),
        expected_gradient(lambda p, q, w: kl_loss("k3_direct", p, q, w)),
    ):
        torch.testing.assert_close(found, kl_gradient(forward=True))
    assert not torch.allclose(kl_gradient(forward=True), kl_gradient())


@pytest.mark.parametrize("sampler", [None, SAMPLER], ids=["on policy", "off policy"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_s8_each_estimator_in_the_loss_has_the_gradient_of_the_divergence(
    estimator: Any, sampler: torch.Tensor | None
) -> None:
    found = expected_gradient(lambda p, q, w: kl_loss(estimator, p, q, w), sampler)
    torch.testing.assert_close(found, kl_gradient())


def test_s8_the_weight_of_another_token_spoils_the_gradient() -> None:
    # why a sequence's ratio may not stand on a token's KL: it multiplies by what others did
    spoilt = expected_gradient(lambda p, q, w: kl_loss("k2", p, q, w * w.roll(1)), SAMPLER)
    assert not torch.allclose(spoilt, kl_gradient(), atol=1e-3)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_the_values_in_the_loss_are_unbiased_off_policy(estimator: Any) -> None:
    policy = LOGITS.log_softmax(0)
    weights = (policy - SAMPLER).exp()
    value = (SAMPLER.exp() * kl_loss(estimator, policy, REFERENCE, weights)).sum()
    torch.testing.assert_close(value, divergence(policy, REFERENCE))


def test_k2_and_k3_have_the_same_gradient_on_every_single_token() -> None:
    def gradient(estimator: Any) -> torch.Tensor:
        policy = LOGITS.log_softmax(0).requires_grad_()
        kl_loss(estimator, policy, REFERENCE, torch.full((5,), 0.7).double()).sum().backward()
        assert policy.grad is not None
        return policy.grad

    torch.testing.assert_close(gradient("k3"), gradient("k2"))
    torch.testing.assert_close(gradient("k1"), gradient("k2") + 0.7)


def test_s8_the_gradient_agrees_with_finite_differences_and_lowers_the_divergence() -> None:
    gradient, step = expected_gradient(lambda p, q, w: kl_loss("k2", p, q, w)), 1e-6
    for index in range(5):
        moved = LOGITS.clone()
        moved[index] += step
        after = divergence(moved.log_softmax(0), REFERENCE)
        slope = (after - divergence(LOGITS.log_softmax(0), REFERENCE)) / step
        torch.testing.assert_close(slope, gradient[index], atol=1e-5, rtol=1e-4)
    lower = divergence((LOGITS - 0.1 * gradient).log_softmax(0), REFERENCE)
    assert lower < divergence(LOGITS.log_softmax(0), REFERENCE)


def policy_gradient_of_penalty(estimator: Any) -> torch.Tensor:
    """What REINFORCE descends when the penalty is taken off the reward: E[penalty grad log pi]."""
    policy = LOGITS.log_softmax(0)
    mask = np.ones(5, dtype=bool)
    penalty = torch.from_numpy(
        reward_penalty(estimator, policy.numpy(), REFERENCE.numpy(), mask).copy()
    )
    return expected_gradient(lambda p, q, w: penalty * p)


def test_s8_in_the_reward_k1_has_the_gradient_of_the_divergence() -> None:
    torch.testing.assert_close(policy_gradient_of_penalty("k1"), kl_gradient())


def test_s8_in_the_reward_k3_is_the_difference_of_both_directions() -> None:
    expected = kl_gradient() - kl_gradient(forward=True)
    torch.testing.assert_close(policy_gradient_of_penalty("k3"), expected)


def test_in_the_reward_the_full_kl_has_no_force_where_it_stands() -> None:
    # one number for all five actions: E[K grad log pi] = 0
    kl = divergence(LOGITS.log_softmax(0), REFERENCE)
    found = expected_gradient(lambda p, q, w: kl * p)
    torch.testing.assert_close(found, torch.zeros(5, dtype=torch.float64))


def test_loss_and_reward_parts_of_the_full_kl_add_up_to_the_gradient_of_a_responses_kl() -> None:
    # responses of two tokens out of three, all nine of them; row 0 of each policy is that of the
    # first token, row 1 + a that of the second after a
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 3, generator=draw, dtype=torch.float64).requires_grad_()
    ref = torch.randn(4, 3, generator=draw, dtype=torch.float64).log_softmax(-1)
    policy = logits.log_softmax(-1)
    joint = policy[0][:, None] + policy[1:]
    whole = (joint.exp() * (joint - (ref[0][:, None] + ref[1:]))).sum()
    (expected,) = torch.autograd.grad(whole, logits, retain_graph=True)
    full = (policy.exp() * (policy - ref)).sum(-1)  # [4]
    reached = torch.cat([torch.ones(1).double(), policy[0].exp().detach()])
    (in_loss,) = torch.autograd.grad((reached * full).sum(), logits, retain_graph=True)
    penalty = full.detach()[0] + full.detach()[1:][:, None]  # of the first and second token
    (in_reward,) = torch.autograd.grad((joint.exp().detach() * penalty * joint).sum(), logits)
    torch.testing.assert_close(in_loss + in_reward, expected)
    assert not torch.allclose(in_loss, expected, atol=1e-3)


def full_kl(**keys: Any) -> Grpo:
    return Grpo(GrpoConfig(kl_coef=0.5, kl_estimator="full", **keys), 64)


def test_in_the_loss_the_full_kl_is_added_as_it_is_with_its_gradient() -> None:
    learner = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    kl = torch.tensor([0.2, 0.0, 0.6], requires_grad=True)
    # a far sampler: a weight of its own would show
    inputs = loss_inputs(learner, torch.tensor([-9.0, -0.1, -0.5]), torch.zeros(3), lengths=[1, 2])
    with pytest.raises(RecordError, match="no reference_kl"):
        full_kl().loss(inputs)
    inputs = replace(inputs, reference_kl=kl)
    losses, sums = full_kl().loss(inputs)
    torch.testing.assert_close(losses, 0.5 * kl)
    losses.sum().backward()
    assert kl.grad is not None
    assert kl.grad.tolist() == [0.5, 0.5, 0.5]
    total, count = sums["learner/kl_ref_response"]
    assert (total.item(), count) == (pytest.approx(0.8), 2)
    assert not total.requires_grad


def test_in_the_reward_the_full_kl_of_trained_tokens_is_taken_off() -> None:
    scored = make_scored(
        "0/0", make_prompt(0, [3]), [4, 5, 6], [-1.0] * 3, 1.0, mask=[True, False, True]
    )
    algorithm = full_kl(kl_in="reward")
    with pytest.raises(RecordError, match="no reference_kl"):
        algorithm.token_penalties(scored)
    scored = replace(scored, reference_kl=np.array([0.2, 9.0, 0.6], dtype=np.float32))
    np.testing.assert_allclose(algorithm.token_penalties(scored), [0.1, 0.0, 0.3], rtol=1e-6)


def test_only_an_active_full_kl_asks_for_a_reference_and_for_none_of_the_scorer() -> None:
    assert full_kl().full_kl_in == "loss"
    assert full_kl(kl_in="reward").full_kl_in == "reward"
    assert not full_kl().needs_reference
    assert Grpo(GrpoConfig(kl_estimator="full"), 64).full_kl_in is None
    assert Grpo(GrpoConfig(kl_coef=0.5), 64).full_kl_in is None


def test_penalties_of_masked_tokens_are_zero_and_others_by_hand() -> None:
    sampled = np.array([-1.0, -2.0, -3.0], dtype=np.float32)
    ref = np.array([-1.5, -1.0, -9.0], dtype=np.float32)
    mask = np.array([True, True, False])
    by_hand = {
        "k1": [0.5, -1.0, 0.0],
        "k2": [0.125, 0.5, 0.0],
        "k3": [math.exp(-0.5) - 0.5, math.exp(1.0) - 2, 0.0],
    }
    for estimator, expected in by_hand.items():
        found = reward_penalty(estimator, sampled, ref, mask)  # type: ignore[arg-type]
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_everything_is_finite_for_logprobs_far_apart() -> None:
    policy, other = torch.tensor([-200.0, 0.0]), torch.tensor([0.0, -200.0])
    for estimator in ("k1", "k2", "k3", "k3_direct"):
        assert torch.isfinite(kl_loss(estimator, policy, other, torch.ones(2))).all()
    found = reward_penalty("k3", policy.numpy(), other.numpy(), np.ones(2, dtype=bool))
    assert np.isfinite(found).all()


def test_s11_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(RecordError, match=r"must all be \[N\]"):
        kl_loss("k2", torch.zeros(2), torch.zeros(2, 1), torch.ones(2))
    with pytest.raises(RecordError, match=r"must all be \[T\]"):
        reward_penalty("k1", np.zeros(2), np.zeros((2, 1)), np.ones(2, dtype=bool))


def test_a_fixed_coefficient_stays() -> None:
    controller = KlController(0.3, FixedKl())
    controller.update(50.0, 100)
    assert controller.coef == 0.3


def test_the_adaptive_coefficient_follows_its_target() -> None:
    controller = KlController(0.1, AdaptiveKl(target=6.0, horizon=1000))
    controller.update(6.6, 100)  # 10 % over: 0.1 * (1 + 0.1 * 100 / 1000)
    assert controller.coef == pytest.approx(0.1 * 1.01)
    controller.update(60.0, 100)  # far over: the error counts as 20 %
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02)
    controller.update(0.0, 5000)  # a step over the horizon counts as the horizon
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.8)
    controller.update(None, 100)
    assert controller.coef == pytest.approx(0.1 * 1.01 * 1.02 * 0.8)


def test_the_adaptive_coefficient_reaches_a_target_that_answers_to_it() -> None:
    controller, kl = KlController(0.01, AdaptiveKl(target=6.0, horizon=500)), 0.0
    for _ in range(400):
        kl = 1 / controller.coef  # the larger the coefficient, the smaller the KL
        controller.update(kl, 256)
    assert kl == pytest.approx(6.0, rel=1e-3)


def test_the_linear_coefficient_goes_to_its_end_and_stays() -> None:
    controller, seen = KlController(0.4, LinearKl(final=0.0, steps=4)), []
    for _ in range(6):
        seen.append(controller.coef)
        controller.update(None, 8)
    assert seen == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


@pytest.mark.parametrize("control", [AdaptiveKl(target=3.0), LinearKl(final=1.0, steps=9)])
def test_a_controller_that_is_loaded_goes_on_as_if_nothing_had_happened(control: Any) -> None:
    whole, first, second = (KlController(0.2, control) for _ in range(3))
    for _ in range(4):
        whole.update(5.0, 640)
        first.update(5.0, 640)
    second.load_state(first.state())
    for _ in range(3):
        whole.update(1.0, 640)
        second.update(1.0, 640)
    assert second.coef == whole.coef
    assert second.state() == whole.state()
