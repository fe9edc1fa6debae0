"""Importance weights stay finite, are truncated for the loss, and reported before truncation."""

import math

import pytest
import torch

from rlhf_cluster.algorithms.importance import (
    effective_sample_size,
    metric_sums,
    truncated_weight,
)
from rlhf_cluster.errors import RecordError


def _means(logprobs: torch.Tensor, sampled: torch.Tensor, cap: float | None) -> dict[str, float]:
    sums = metric_sums(logprobs, sampled, cap)
    means = {n: (s.item() if n.endswith("_max") else (s / c).item()) for n, (s, c) in sums.items()}
    return effective_sample_size(means)


def test_weights_are_ratios_up_to_the_cap() -> None:
    sampled = torch.tensor([-2.0, -2.0, -2.0])
    learner = sampled + torch.tensor([0.5, 1.5, 4.0]).log()
    torch.testing.assert_close(
        truncated_weight(learner, sampled, 2.0), torch.tensor([0.5, 1.5, 2.0])
    )


def test_metrics_match_hand_numbers_and_show_ratios_before_the_cap() -> None:
    sampled = torch.tensor([-2.0, -2.0, -2.0, -2.0])
    learner = sampled + torch.tensor([0.25, 1.0, 3.0, 8.0]).log()
    means = _means(learner, sampled, cap=2.0)
    assert means["importance/ratio_mean"] == pytest.approx(12.25 / 4)
    assert means["importance/ratio_max"] == pytest.approx(8.0)
    assert means["importance/capped_fraction"] == 0.5
    assert means["importance/outside_band_fraction"] == 0.5
    squares = 0.0625 + 1 + 9 + 64
    expected = 12.25**2 / (4 * squares)
    assert means["importance/effective_sample_size"] == pytest.approx(expected)
    assert "importance/ratio_squared" not in means
    difference = (math.log(4) + 0 + math.log(3) + math.log(8)) / 4
    assert means["importance/logprob_diff_mean"] == pytest.approx(difference)


def test_nothing_counts_as_capped_without_a_cap() -> None:
    learner, sampled = torch.tensor([0.0, -1.0]), torch.tensor([-9.0, -1.0])
    assert _means(learner, sampled, cap=None)["importance/capped_fraction"] == 0


def test_s10_weights_and_metrics_are_finite_for_any_finite_logprobs() -> None:
    # a product of 300 ratios of 0.7 is 0 in float32; token weights never multiply
    long = torch.full((300,), math.log(0.7))
    torch.testing.assert_close(
        truncated_weight(long, torch.zeros(300), 2.0), torch.full((300,), 0.7)
    )
    learner = torch.tensor([0.0, -1e30, -200.0, 0.0])
    sampled = torch.tensor([-1e30, 0.0, 0.0, -200.0])
    weights = truncated_weight(learner, sampled, 2.0)
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    means = _means(learner, sampled, cap=2.0)
    assert all(math.isfinite(v) for v in means.values())


def test_no_gradient_flows_through_weights() -> None:
    learner = torch.tensor([-1.0], requires_grad=True)
    assert not truncated_weight(learner, torch.tensor([-2.0]), 2.0).requires_grad


def test_no_token_gives_zero_counts_and_no_error() -> None:
    sums = metric_sums(torch.zeros(0), torch.zeros(0), 2.0)
    assert {count.item() for _, count in sums.values()} == {0}


def test_s11_a_column_against_a_row_is_refused() -> None:
    with pytest.raises(RecordError, match=r"both must be \[N\]"):
        truncated_weight(torch.zeros(2, 1), torch.zeros(2), 2.0)
