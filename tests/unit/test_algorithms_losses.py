"""The clipped objective and masked sums against numbers worked out by hand."""

import math

import pytest
import torch

from rlhf_cluster.algorithms.losses import clipped_policy_loss, masked_sum
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


def test_s1_mean_over_all_tokens_is_not_the_mean_of_micro_batch_means() -> None:
    short, long = torch.full((100,), 0.5), torch.full((900,), 0.3)
    sums = [masked_sum(v, torch.ones_like(v, dtype=torch.bool)) for v in (short, long)]
    total, count = (torch.stack(parts).sum() for parts in zip(*sums, strict=True))
    assert (total / count).item() == pytest.approx(0.32, abs=1e-6)


def test_s4_denominator_counts_only_what_the_numerator_sums() -> None:
    values = torch.arange(30, dtype=torch.float32)
    mask = torch.ones(30, dtype=torch.bool)
    mask[[0, 7, 13, 21, 29]] = False
    values = values.masked_fill(~mask, math.nan)
    total, count = masked_sum(values, mask)
    assert count == 25
    assert (total / count).item() == pytest.approx((435 - 70) / 25)


def test_s4_an_empty_micro_batch_adds_nothing_and_still_goes_backward() -> None:
    values = torch.ones(4, requires_grad=True)
    total, count = masked_sum(values, torch.zeros(4, dtype=torch.bool))
    total.backward()
    assert (total.item(), count.item()) == (0, 0)
    assert values.grad is not None
    assert values.grad.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(2, 1), (3,), ()])
def test_s11_shapes_that_would_broadcast_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(RecordError, match="must both"):
        clipped_policy_loss(torch.zeros(2), torch.ones(shape), 0.2, 0.3)
    with pytest.raises(RecordError, match="one shape"):
        masked_sum(torch.zeros(2), torch.ones(shape))
