"""Preference losses: finite everywhere, summed alike, refused where they mean nothing."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError

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


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_losses_and_gradients_stay_finite_far_from_the_reference(
    name: str, divergence: str, dtype: torch.dtype
) -> None:
    if name != "dpo" and divergence != "reverse_kl":
        return
    far = [(-3000.0, -1.0), (-1.0, -3000.0), (-3000.0, -3000.0), (0.0, 0.0)]
    chosen, rejected = (torch.tensor(v, dtype=dtype) for v in zip(*far, strict=True))
    pairs = Pairs(
        chosen=chosen.requires_grad_(),
        rejected=rejected.requires_grad_(),
        chosen_tokens=torch.tensor([3, 3, 1, 1]),
        rejected_tokens=torch.tensor([3, 3, 1, 1]),
        ref_chosen=torch.full((4,), -50.0, dtype=dtype),
        ref_rejected=torch.full((4,), -50.0, dtype=dtype),
    )
    keys = {"divergence": divergence} if name == "dpo" else {}
    losses, _ = section(name, **keys).losses(pairs)
    losses.sum().backward()
    assert losses.isfinite().all()
    for side in (pairs.chosen, pairs.rejected):
        assert side.grad is not None
        assert side.grad.isfinite().all()
    assert pairs.chosen.grad is not None
    assert pairs.chosen.grad[0] < 0, "a chosen response that is lost is still raised"


# Metrics


def test_a_falling_chosen_response_is_flagged_though_the_margin_grows() -> None:
    pairs = Pairs(
        chosen=vector(-6.0, -6.0, -4.0),
        rejected=vector(-20.0, -20.0, -20.0),
        chosen_tokens=torch.ones(3),
        rejected_tokens=torch.ones(3),
        ref_chosen=vector(-5.0, -5.0, -5.0),
        ref_rejected=vector(-9.0, -9.0, -9.0),
    )
    _, sums = section("dpo").losses(pairs)
    means = {name: (total / count).item() for name, (total, count) in sums.items()}
    assert means["preference/margin"] > 0
    assert means["preference/accuracy"] == 1.0
    assert means["preference/chosen_fell_fraction"] == pytest.approx(2 / 3)
    assert means["preference/chosen_logprob"] == pytest.approx(-16 / 3)
    assert means["preference/rejected_logprob"] == -20.0


def test_s1_metric_sums_and_losses_do_not_depend_on_micro_batches() -> None:
    whole, loss = random_pairs(), section("dpo", nll_coef=1.0)
    losses, sums = loss.losses(whole)

    def part(rows: slice) -> Pairs:
        assert whole.ref_chosen is not None
        assert whole.ref_rejected is not None
        return Pairs(
            chosen=whole.chosen[rows],
            rejected=whole.rejected[rows],
            chosen_tokens=whole.chosen_tokens[rows],
            rejected_tokens=whole.rejected_tokens[rows],
            ref_chosen=whole.ref_chosen[rows],
            ref_rejected=whole.ref_rejected[rows],
        )

    parts = [loss.losses(part(rows)) for rows in (slice(0, 5), slice(5, 5), slice(5, 32))]
    torch.testing.assert_close(torch.cat([p[0] for p in parts]), losses)
    for name, (total, count) in sums.items():
        torch.testing.assert_close(torch.stack([p[1][name][0] for p in parts]).sum(), total)
        assert sum(p[1][name][1].item() for p in parts) == count.item() == 32


# Refusals


def test_s11_shapes_that_would_broadcast_are_refused() -> None:
    good = {"chosen": vector(-1.0, -2.0), "rejected": vector(-1.0, -2.0)}
    tokens = {"chosen_tokens": torch.ones(2), "rejected_tokens": torch.ones(2)}
    for name, bad in (("rejected", vector(-1.0)), ("chosen_tokens", torch.ones(2, 1))):
        with pytest.raises(RecordError, match="all must be vectors of one length"):
            Pairs(**{**good, **tokens, name: bad})
    with pytest.raises(RecordError, match="have no log-probabilities of one"):
        section("dpo").losses(Pairs(**good, **tokens))
    section("simpo").losses(Pairs(**good, **tokens))
    with pytest.raises(RecordError, match="one length"):
        Labelled(policy=vector(-1.0), ref=vector(-1.0, 0.0), desirable=torch.tensor([True]))
    labelled = Labelled(policy=vector(-1.0), ref=vector(-1.0), desirable=torch.tensor([True]))
    with pytest.raises(RecordError, match="must be a scalar"):
        section("kto").losses(labelled, vector(0.0))


@pytest.mark.parametrize(
    ("type", "keys"),
    [
        ("dpo", {"label_smoothing": 0.5}),
        ("dpo", {"alpha": 1.0}),
        ("dpo", {"beta": 0}),
        ("robust_dpo", {"flip_probability": 0.5}),
        ("simpo", {"divergence": "js"}),
        ("ppo", {}),
    ],
)
def test_sections_refuse_what_has_no_meaning(type: str, keys: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        section(type, **keys)
