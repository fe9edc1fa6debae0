"""The surrogates and masked sums against numbers worked out by hand, and their gradients."""

import math
from collections.abc import Callable

import pytest
import torch

from rlhf_cluster.algorithms.policy_losses import (
    cispo_policy_loss,
    clipped_policy_loss,
    gated_policy_loss,
    plain_policy_loss,
)
from rlhf_cluster.errors import RecordError


def test_clipped_loss_takes_the_smaller_of_both_branches() -> None:
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    loss, clipped = clipped_policy_loss(log_ratio, advantages, clip_low=0.2, clip_high=0.3)
    # 1.3 * 2; 1.5 * -2 free; 0.5 * 2 free; 0.8 * -2; inside the bounds
    expected = torch.tensor([-2.6, 3.0, -1.0, 1.6, -1.1])
    torch.testing.assert_close(loss, expected)
    assert clipped.tolist() == [True, False, False, True, False]


def test_gradient_is_zero_exactly_where_the_bound_was_taken() -> None:
    log_ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1]).log().requires_grad_()
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    loss, clipped = clipped_policy_loss(log_ratio, advantages, 0.2, 0.3)
    loss.sum().backward()
    assert log_ratio.grad is not None
    assert ((log_ratio.grad == 0) == clipped).all()
    assert log_ratio.grad[4].item() == pytest.approx(-1.1)


def test_the_dual_clip_bounds_the_loss_of_bad_tokens_and_only_theirs() -> None:
    log_ratio = torch.tensor([8.0, 8.0, 2.0, 0.5], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([-1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    loss, clipped = clipped_policy_loss(log_ratio, advantages, 0.2, 0.2, dual_clip=3.0)
    # 8 is over the bound of 3; a good token is clipped at 1.2; 2 is free; 0.5 is clipped at 0.8
    torch.testing.assert_close(loss, torch.tensor([3.0, -1.2, 2.0, 0.8], dtype=torch.float64))
    assert clipped.tolist() == [True, True, False, True]
    loss.sum().backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad, torch.tensor([0, 0, 2.0, 0], dtype=torch.float64))


def test_the_soft_gate_matches_hand_numbers_and_has_slope_one_at_ratio_one() -> None:
    log_ratio = torch.tensor([1.0, 1.0, 2.0, 0.5], dtype=torch.float64).log().requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 1.0, -1.0], dtype=torch.float64)
    loss = gated_policy_loss(log_ratio, advantages, 1.0, 1.05)

    def gate(ratio: float, tau: float) -> float:
        return 4 / tau / (1 + math.exp(-tau * (ratio - 1)))

    # at ratio 1 the gate is 2 / tau
    expected = [-2.0, 2 * 2 / 1.05, -gate(2.0, 1.0), gate(0.5, 1.05)]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    loss.sum().backward()
    assert log_ratio.grad is not None
    torch.testing.assert_close(log_ratio.grad[:2], -advantages[:2])
    assert 0 < -log_ratio.grad[2] < 2, "the gate has faded, the free gradient would be the ratio"


def test_negative_advantages_fade_faster() -> None:
    log_ratio = torch.tensor([3.0, 3.0]).log().requires_grad_()
    gated_policy_loss(log_ratio, torch.tensor([1.0, -1.0]), 1.0, 2.0).sum().backward()
    assert log_ratio.grad is not None
    assert 0 < log_ratio.grad[1] < -log_ratio.grad[0]


def test_cispo_bounds_the_weight_and_keeps_every_gradient() -> None:
    log_ratio = torch.tensor([9.0, 0.1, 2.0]).log().requires_grad_()
    learner = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.0, 1.0, -1.0])
    loss, clipped = cispo_policy_loss(log_ratio, learner, advantages, 1.0, 4.0)
    torch.testing.assert_close(loss, torch.tensor([5.0, 0.2, -6.0]))
    assert clipped.tolist() == [True, False, False]
    loss.sum().backward()
    assert log_ratio.grad is None
    torch.testing.assert_close(learner.grad, torch.tensor([-5.0, -0.1, 2.0]))


def test_the_plain_loss_is_the_ratio_times_the_advantage() -> None:
    log_ratio = torch.tensor([1.0, 2.0]).log().requires_grad_()
    loss = plain_policy_loss(log_ratio, torch.tensor([3.0, -1.0]))
    torch.testing.assert_close(loss, torch.tensor([-3.0, 2.0]))
    loss.sum().backward()
    torch.testing.assert_close(log_ratio.grad, torch.tensor([-3.0, 2.0]))


@pytest.mark.parametrize(
    "loss",
    [
        lambda r, a: clipped_policy_loss(r, a, 0.2, 0.3)[0],
        lambda r, a: clipped_policy_loss(r, a, 0.2, 0.3, 1.6)[0],
        lambda r, a: gated_policy_loss(r, a, 1.0, 1.05),
        plain_policy_loss,
    ],
    ids=["clipped", "dual clip", "gate", "plain"],
)
def test_gradients_agree_with_finite_differences(loss: Callable[..., torch.Tensor]) -> None:
    draw = torch.Generator().manual_seed(3)
    log_ratio = torch.randn(64, generator=draw, dtype=torch.float64).requires_grad_()
    advantages = torch.randn(64, generator=draw, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda r: loss(r, advantages), (log_ratio,))


@pytest.mark.parametrize("shape", [(2, 1), (3,), ()])
def test_s11_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecordError, match="must both"):
        clipped_policy_loss(torch.zeros(2), torch.ones(shape), 0.2, 0.3)
    with pytest.raises(RecordError, match="must both"):
        gated_policy_loss(torch.zeros(2), torch.ones(shape), 1.0, 1.0)
    with pytest.raises(RecordError, match="must both"):
        cispo_policy_loss(torch.zeros(2), torch.zeros(shape), torch.zeros(2), 1.0, 4.0)
    with pytest.raises(RecordError, match="must both"):
        plain_policy_loss(torch.zeros(2), torch.ones(shape))
