"""Preference losses: numbers worked out by hand, a slow second implementation, limits, gradients."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from rlhf_cluster.algorithms import preference_losses
from rlhf_cluster.algorithms.preference_losses import (
    Labelled,
    Pairs,
)
from rlhf_cluster.errors import RecordError
from tests.support.builders.preference_losses import (
    F64,
    PAIRED,
    random_pairs,
    section,
    vector,
)


def one_pair(chosen: float, rejected: float, lengths=(1, 1), ref=(0.0, 0.0)) -> Pairs:
    return Pairs(
        chosen=vector(chosen).requires_grad_(),
        rejected=vector(rejected).requires_grad_(),
        chosen_tokens=torch.tensor([lengths[0]]),
        rejected_tokens=torch.tensor([lengths[1]]),
        ref_chosen=vector(ref[0]),
        ref_rejected=vector(ref[1]),
    )


# Numbers worked out by hand


def s(x: float) -> float:
    return -math.log1p(math.exp(-x))


HAND: dict[str, tuple[Any, float]] = {
    # r_w = 1, r_l = -2, so their difference is 3
    "dpo": (section("dpo", beta=0.5), math.log(1 + math.exp(-1.5))),
    "dpo, cDPO": (
        section("dpo", beta=0.5, label_smoothing=0.1),
        0.9 * math.log(1 + math.exp(-1.5)) + 0.1 * math.log(1 + math.exp(1.5)),
    ),
    "dpo, forward KL": (
        section("dpo", beta=0.5, divergence="forward_kl"),
        -s(0.5 * (math.exp(2) - math.exp(-1))),
    ),
    "dpo, JS": (section("dpo", beta=0.5, divergence="js"), -s(0.5 * (s(1.0) - s(-2.0)))),
    "dpo, alpha": (
        section("dpo", beta=0.5, divergence="alpha", alpha=0.5),
        -s(0.5 * 2 * (math.exp(1) - math.exp(-0.5))),
    ),
    "robust_dpo": (
        section("robust_dpo", beta=0.5, flip_probability=0.1),
        (0.9 * math.log(1 + math.exp(-1.5)) - 0.1 * math.log(1 + math.exp(1.5))) / 0.8,
    ),
    # (1 / 2 - -2 / 4) - 1 / (2 * 0.25) = -1
    "ipo": (section("ipo", beta=0.25), 1.0),
    "ipo, sums": (section("ipo", beta=0.25, per_token=False), 1.0),
    "dpop": (section("dpop", beta=0.5), math.log(1 + math.exp(-1.5))),  # r_w > 0: no penalty
    # means -4/2 and -10/4: 2 * 0.5 - 0.25
    "simpo": (section("simpo", beta=2.0, gamma=0.25), -s(0.75)),
    "rpo": (section("dpo", beta=0.5, nll_coef=0.5), math.log(1 + math.exp(-1.5)) + 0.5 * 2.0),
    "orpo": (
        section("orpo", odds_coef=0.5),
        2.0
        - 0.5
        * s(
            math.log(math.exp(-2.0) / (1 - math.exp(-2.0)))
            - math.log(math.exp(-2.5) / (1 - math.exp(-2.5)))
        ),
    ),
}


@pytest.mark.parametrize(("loss", "expected"), HAND.values(), ids=HAND)
def test_the_loss_of_one_pair_is_the_one_worked_out_by_hand(loss: Any, expected: float) -> None:
    pair = one_pair(-4.0, -10.0, lengths=(2, 4), ref=(-5.0, -8.0))
    found, _ = loss.losses(pair)
    assert found.shape == (1,)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_every_paired_loss_has_a_number_worked_out_by_hand() -> None:
    assert {loss.type for loss, _ in HAND.values()} == set(PAIRED)


def test_dpop_pays_for_a_chosen_response_that_fell() -> None:
    pair = one_pair(-5.5, -10.0, ref=(-5.0, -8.0))  # r_w = -0.5, r_l = -2
    found, _ = section("dpop", beta=0.5, penalty=4.0).losses(pair)
    assert found.item() == pytest.approx(-s(0.5 * (1.5 - 4 * 0.5)), rel=1e-12)


def test_kto_is_the_one_worked_out_by_hand() -> None:
    labelled = Labelled(
        policy=vector(-4.0, -10.0, -7.0),
        ref=vector(-5.0, -8.0, -7.0),
        desirable=torch.tensor([True, False, True]),
    )
    loss = section("kto", beta=0.5, desirable_weight=2.0, undesirable_weight=3.0)
    found, sums = loss.losses(labelled, torch.tensor(0.5, dtype=F64))

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    expected = [2 * (1 - sigmoid(0.25)), 3 * (1 - sigmoid(1.25)), 2 * (1 - sigmoid(-0.25))]
    torch.testing.assert_close(found, vector(*expected))
    means = {name: (total / count).item() for name, (total, count) in sums.items()}
    assert means["preference/accuracy"] == pytest.approx(2 / 3)
    assert means["preference/chosen_logprob"] == -5.5
    assert means["preference/rejected_log_ratio"] == -2.0
    assert means["preference/kl_baseline"] == 0.5


def test_the_kl_baseline_is_never_negative_and_has_no_gradient() -> None:
    policy = vector(-1.0, -2.0).requires_grad_()
    assert preference_losses.kto_baseline(policy, vector(-2.0, -1.5)).item() == pytest.approx(0.25)
    low = preference_losses.kto_baseline(policy, vector(-0.5, -0.5))
    assert low.item() == 0.0
    assert not low.requires_grad
    with pytest.raises(RecordError, match="at least one unmatched response"):
        preference_losses.kto_baseline(vector(), vector())


# A slow second implementation


def slow_loss(loss: Any, c: float, r: float, nc: int, nr: int, rc: float, rr: float) -> float:
    """One pair, in plain floats. Nothing is shared but the section."""
    rw, rl, mw, ml = c - rc, r - rr, c / nc, r / nr
    if loss.type == "dpo":
        links: dict[str, Callable[[float], float]] = {
            "reverse_kl": lambda x: x,
            "forward_kl": lambda x: 1 - math.exp(-x),
            "js": lambda x: math.log(2 * math.exp(x) / (1 + math.exp(x))),
            "alpha": lambda x: (1 - math.exp(x) ** -loss.alpha) / loss.alpha,
        }
        g = links[loss.divergence]
        h = loss.beta * (g(rw) - g(rl))
        found = -(1 - loss.label_smoothing) * s(h) - loss.label_smoothing * s(-h)
    elif loss.type == "robust_dpo":
        e, h = loss.flip_probability, loss.beta * (rw - rl)
        found = ((1 - e) * -s(h) - e * -s(-h)) / (1 - 2 * e)
    elif loss.type == "ipo":
        h = rw / nc - rl / nr if loss.per_token else rw - rl
        found = (h - 1 / (2 * loss.beta)) ** 2
    elif loss.type == "dpop":
        found = -s(loss.beta * (rw - rl - loss.penalty * max(0.0, -rw)))
    elif loss.type == "simpo":
        found = -s(loss.beta * mw - loss.beta * ml - loss.gamma)
    else:
        odds = [math.exp(m) / (1 - math.exp(m)) for m in (mw, ml)]
        found = -loss.odds_coef * s(math.log(odds[0] / odds[1]))
    return found - loss.nll_coef * mw


SLOW = [
    *(loss for loss, _ in HAND.values()),
    section("dpo", divergence="alpha", alpha=0.2, label_smoothing=0.2),
    section("dpop", beta=0.1, penalty=0.5, nll_coef=1.0),
    section("ipo", nll_coef=0.3),
]


@pytest.mark.parametrize("loss", SLOW, ids=str)
@pytest.mark.parametrize(("dtype", "rtol"), [(F64, 1e-9), (torch.float32, 2e-4)])
def test_losses_and_gradients_are_those_of_a_slow_loop(
    loss: Any, dtype: torch.dtype, rtol: float
) -> None:
    pairs = random_pairs(dtype=dtype)
    assert pairs.ref_chosen is not None
    assert pairs.ref_rejected is not None
    found, _ = loss.losses(pairs)
    found.sum().backward()
    columns = [
        t.tolist()
        for t in (
            pairs.chosen,
            pairs.rejected,
            pairs.chosen_tokens,
            pairs.rejected_tokens,
            pairs.ref_chosen,
            pairs.ref_rejected,
        )
    ]
    gradients = (pairs.chosen.grad, pairs.rejected.grad)
    for index, row in enumerate(zip(*columns, strict=True)):
        expected = slow_loss(loss, *row)
        assert found[index].item() == pytest.approx(expected, rel=rtol, abs=rtol)
        for side, gradient in enumerate(gradients):
            assert gradient is not None
            up, down = ([v + d * (i == side) for i, v in enumerate(row)] for d in (1e-6, -1e-6))
            slope = (slow_loss(loss, *up) - slow_loss(loss, *down)) / 2e-6
            tolerance = max(rtol, 1e-5)
            assert gradient[index].item() == pytest.approx(slope, rel=tolerance, abs=tolerance)


# Limits and symmetry


@pytest.mark.parametrize("name", PAIRED)
def test_where_policy_and_reference_agree_the_chosen_one_is_raised_and_the_other_lowered(
    name: str,
) -> None:
    pairs = one_pair(-4.0, -9.0, lengths=(2, 3), ref=(-4.0, -9.0))
    losses, sums = section(name).losses(pairs)
    losses.sum().backward()
    assert pairs.chosen.grad is not None
    assert pairs.rejected.grad is not None
    assert pairs.chosen.grad.item() < 0 < pairs.rejected.grad.item()
    if section(name).needs_reference:
        assert sums["preference/accuracy"][0].item() == 0.5, "a tie is half right"
    if name == "dpo":
        assert pairs.chosen.grad.item() == pytest.approx(-0.05)


def test_alpha_goes_from_reverse_kl_to_forward_kl() -> None:
    ratios = torch.linspace(-3, 3, 13, dtype=F64)
    near_zero = preference_losses.link(ratios, "alpha", 1e-7)
    torch.testing.assert_close(near_zero, ratios, rtol=1e-5, atol=1e-5)
    at_one = preference_losses.link(ratios, "alpha", 1.0)
    torch.testing.assert_close(at_one, 1 + preference_losses.link(ratios, "forward_kl"))


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_swapping_a_pair_turns_its_margin_round(divergence: Any) -> None:
    pairs = random_pairs()
    swapped = Pairs(
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        chosen_tokens=pairs.rejected_tokens,
        rejected_tokens=pairs.chosen_tokens,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
    )
    loss, turned = (preference_losses.dpo_loss(p, 0.3, divergence) for p in (pairs, swapped))
    # sigmoid(h) + sigmoid(-h) = 1
    torch.testing.assert_close((-loss).exp() + (-turned).exp(), torch.ones(32, dtype=F64))
    smooth = [
        preference_losses.dpo_loss(p, 0.3, divergence, label_smoothing=0.499999)
        for p in (pairs, swapped)
    ]
    torch.testing.assert_close(*smooth, rtol=1e-4, atol=1e-4)


def test_robust_dpo_on_flipped_labels_is_dpo_on_the_right_ones() -> None:
    pairs, flip = random_pairs(), 0.2
    right = preference_losses.dpo_loss(pairs, 0.3)
    of_right = preference_losses.robust_dpo_loss(pairs, 0.3, flip)
    logits = 0.3 * (pairs.log_ratios[0] - pairs.log_ratios[1])
    flipped = one_side_flipped(logits, flip)
    torch.testing.assert_close((1 - flip) * of_right + flip * flipped, right)


def one_side_flipped(logits: torch.Tensor, flip: float) -> torch.Tensor:
    zeros, tokens = torch.zeros_like(logits), torch.ones_like(logits)
    pairs = Pairs(
        chosen=-logits,
        rejected=zeros,
        chosen_tokens=tokens,
        rejected_tokens=tokens,
        ref_chosen=zeros,
        ref_rejected=zeros,
    )
    return preference_losses.robust_dpo_loss(pairs, 1.0, flip)
