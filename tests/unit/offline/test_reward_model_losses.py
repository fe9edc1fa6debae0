"""Reward-model losses against numbers worked out by hand, a slow loop, and finite differences."""

import math

import pytest
import torch

from rlhf_cluster.errors import RecordError
from rlhf_cluster.offline.reward_model_losses import (
    bradley_terry_loss,
    pair_score_metrics,
    plackett_luce_loss,
    pointwise_loss,
)

F64 = torch.float64


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


def s(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_bradley_terry_is_the_one_worked_out_by_hand() -> None:
    chosen, rejected = vector(2.0, -1.0), vector(0.5, 1.0)
    torch.testing.assert_close(bradley_terry_loss(chosen, rejected), vector(-s(1.5), -s(-2.0)))
    found = bradley_terry_loss(chosen, rejected, vector(1.0, 0.0), 0.1, 0.01)
    expected = [
        -0.9 * s(0.5) - 0.1 * s(-0.5) + 0.01 * 6.25,
        -0.9 * s(-2.0) - 0.1 * s(2.0) + 0.0,
    ]
    torch.testing.assert_close(found, vector(*expected))


def test_bradley_terry_without_centring_does_not_know_a_constant() -> None:
    chosen, rejected = vector(2.0, -1.0), vector(0.5, 1.0)
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 7, rejected + 7), bradley_terry_loss(chosen, rejected)
    )
    raised = bradley_terry_loss(chosen + 7, rejected + 7, centring=0.01)
    assert (raised > bradley_terry_loss(chosen, rejected, centring=0.01)).all()


def slow_plackett_luce(scores: list[float]) -> float:
    """Minus the log of the chance of the order: the best of all, the best of the rest, ..."""
    found = 0.0
    for k in range(len(scores)):
        rest = [math.exp(v) for v in scores[k:]]
        found -= math.log(rest[0] / math.fsum(rest))
    return found


def test_plackett_luce_is_a_slow_loop_over_the_choices() -> None:
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(5, 4, generator=draw, dtype=F64)
    lengths = torch.tensor([4, 3, 2, 1, 4])
    mask = torch.arange(4) < lengths[:, None]
    hidden = scores.masked_fill(~mask, math.nan).requires_grad_()
    found = plackett_luce_loss(hidden, mask)
    expected = [
        slow_plackett_luce(row[:n].tolist()) for row, n in zip(scores, lengths, strict=True)
    ]
    torch.testing.assert_close(found, vector(*expected))
    assert found[3] == 0, "one response has one order"
    found.sum().backward()
    assert hidden.grad is not None
    assert (hidden.grad[~mask] == 0).all()
    assert hidden.grad[mask].isfinite().all()


def test_plackett_luce_of_two_is_bradley_terry() -> None:
    chosen, rejected = vector(2.0, -1.0), vector(0.5, 1.0)
    two = torch.stack([chosen, rejected], 1)
    found = plackett_luce_loss(two, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(found, bradley_terry_loss(chosen, rejected))


def test_all_orders_of_three_have_chances_that_add_up_to_one() -> None:
    scores = [0.3, -1.0, 2.0]
    orders = [
        [a, b, c] for a in range(3) for b in range(3) for c in range(3) if {a, b, c} == {0, 1, 2}
    ]
    table = torch.tensor([[scores[i] for i in order] for order in orders], dtype=F64)
    found = plackett_luce_loss(table, torch.ones(6, 3, dtype=torch.bool))
    assert (-found).exp().sum().item() == pytest.approx(1.0)
    assert found.argmin() == orders.index([2, 0, 1])


def test_pointwise_losses_are_those_worked_out_by_hand() -> None:
    scores, labels = vector(1.0, -2.0), vector(1.0, 0.25)
    torch.testing.assert_close(
        pointwise_loss(scores, labels, "bce"),
        vector(-s(1.0), -0.25 * s(-2.0) - 0.75 * s(2.0)),
    )
    torch.testing.assert_close(pointwise_loss(scores, labels, "mse"), vector(0.0, 2.25**2))


@pytest.mark.parametrize("kind", ["bce", "mse"])
def test_heads_without_a_label_count_for_nothing(kind) -> None:
    scores = torch.tensor([[1.0, math.nan, 3.0], [0.5, 0.5, 0.5]], dtype=F64).requires_grad_()
    targets = torch.tensor([[0.0, math.nan, 1.0], [math.nan] * 3], dtype=F64)
    found = pointwise_loss(scores, targets, kind, ~targets.isnan())
    own = [pointwise_loss(vector(v), vector(t), kind).item() for v, t in ((1.0, 0.0), (3.0, 1.0))]
    torch.testing.assert_close(found, vector(sum(own) / 2, 0.0))
    found.sum().backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert ((scores.grad != 0) == ~targets.isnan()).all()


def test_gradients_agree_with_finite_differences() -> None:
    draw = torch.Generator().manual_seed(1)
    a, b, c = (torch.randn(6, generator=draw, dtype=F64).requires_grad_() for _ in range(3))
    margins, mask = torch.rand(6, dtype=F64), torch.ones(6, 3, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda x, y: bradley_terry_loss(x, y, margins, 0.1, 0.02), (a, b)
    )
    assert torch.autograd.gradcheck(
        lambda *t: plackett_luce_loss(torch.stack(t, 1), mask), (a, b, c)
    )
    assert torch.autograd.gradcheck(lambda x: pointwise_loss(x, margins, "bce"), (a,))
    assert torch.autograd.gradcheck(lambda x: pointwise_loss(x, margins, "mse"), (a,))


def test_no_gradient_flows_into_margins_and_targets() -> None:
    margins = vector(1.0).requires_grad_()
    score = vector(0.5).requires_grad_()
    (
        bradley_terry_loss(score, vector(0.1), margins) + pointwise_loss(score, margins, "mse")
    ).sum().backward()
    assert margins.grad is None


def test_metrics_of_scored_pairs_count_a_tie_as_half() -> None:
    chosen, rejected = vector(1.0, 0.0, 2.0), vector(0.0, 1.0, 2.0)
    sums = pair_score_metrics(bradley_terry_loss(chosen, rejected), chosen, rejected)
    means = {name: (total / count).item() for name, (total, count) in sums.items()}
    assert means["ranking/accuracy"] == 0.5
    assert means["ranking/margin"] == 0.0
    assert means["ranking/score_mean"] == 1.0


def test_s11_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(RecordError, match=r"chosen \[2\], rejected \[1\]"):
        bradley_terry_loss(vector(1.0, 2.0), vector(1.0))
    with pytest.raises(RecordError, match=r"margins \[2, 1\]"):
        bradley_terry_loss(vector(1.0, 2.0), vector(1.0, 2.0), torch.zeros(2, 1))
    with pytest.raises(RecordError, match="one shape of 2 dimensions"):
        plackett_luce_loss(torch.zeros(2, 3), torch.ones(3, dtype=torch.bool))
    with pytest.raises(RecordError, match="has a hole"):
        plackett_luce_loss(torch.zeros(1, 3), torch.tensor([[True, False, True]]))
    with pytest.raises(RecordError, match="one shape"):
        pointwise_loss(torch.zeros(2, 3), torch.zeros(2), "mse")
