"""The report of the distance to the sampler: hand numbers, exact quantiles, additivity."""

import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rlhf_cluster.algorithms.algorithm import Sums
from rlhf_cluster.algorithms.off_policy_distance import (
    derive_distance,
    distance_sums,
    shares_by_staleness,
)
from rlhf_cluster.observe.metric_table import find
from tests.support.builders.reduced_metrics import reduced

BIN = 10 ** (1 / 8)


def reported(*micro_batches: Sums) -> dict[str, float]:
    return derive_distance(reduced(*micro_batches))


def sums_of(ratios: list[float], staleness: list[float] | None = None) -> Sums:
    sampled = torch.full((len(ratios),), -2.0, dtype=torch.float64)
    learner = sampled + torch.tensor(ratios, dtype=torch.float64).log()
    stale = torch.zeros(len(ratios)) if staleness is None else torch.tensor(staleness)
    return distance_sums(learner, sampled, stale)


def test_the_report_matches_hand_numbers() -> None:
    found = reported(sums_of([0.25, 1.0, 3.0, 8.0]))
    squares = 0.0625 + 1 + 9 + 64
    expected = {
        "importance/ratio_mean": 12.25 / 4,
        "importance/ratio_max": 8.0,
        "importance/outside_band_fraction": 0.5,
        "importance/effective_sample_size": 12.25**2 / (4 * squares),
        "importance/chi_squared": squares / 4 - 1,
        "importance/logprob_diff_mean": (math.log(4) + math.log(3) + math.log(8)) / 4,
        "importance/log_ratio_max": math.log(8),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-12), name


def test_every_reported_name_is_in_the_table_and_no_helper_leaves() -> None:
    found = reported(sums_of([1.0, 2.0] * 6, [float(i) for i in range(12)]))
    assert {find(name).name for name in found} == {
        "importance/ratio_mean",
        "importance/ratio_max",
        "importance/outside_band_fraction",
        "importance/effective_sample_size",
        "importance/chi_squared",
        "importance/logprob_diff_mean",
        "importance/log_ratio_max",
        "importance/log_ratio_p50",
        "importance/log_ratio_p95",
        *(
            f"importance/{name}_by_staleness"
            for name in (
                "ratio_mean",
                "effective_sample_size",
                "chi_squared",
                "outside_band_fraction",
                "logprob_diff_mean",
                "log_ratio_p50",
                "log_ratio_p95",
                "log_ratio_max",
            )
        ),
    }


def test_tokens_of_one_staleness_are_reported_as_if_they_were_all() -> None:
    ratios, staleness = [1.0, 3.0, 2.0, 0.25, 8.0, 1.5], [0.0, 0, 1, 5, 9, 0]
    found = reported(sums_of(ratios, staleness))
    names = [n.removesuffix("_by_staleness/0") for n in found if n.endswith("_by_staleness/0")]
    assert len(names) == 8
    for label, places in {"0": (0, 1, 5), "1": (2,), "5+": (3, 4)}.items():
        alone = reported(sums_of([ratios[i] for i in places]))
        for name in names:
            assert found[f"{name}_by_staleness/{label}"] == pytest.approx(alone[name]), name
    assert not [n for n in found if n.endswith(("/2", "/3", "/4"))], "no token was that stale"


def test_shares_are_reported_by_the_staleness_of_their_tokens() -> None:
    shares = {"masked_fraction": torch.tensor([True, False, False, True, True])}
    found = reported(shares_by_staleness(shares, torch.tensor([0.0, 0, 1, 7, 8])))
    assert found == {
        f"importance/masked_fraction_by_staleness/{k}": v
        for k, v in {"0": 0.5, "1": 0.0, "5+": 1.0}.items()
    }


@given(
    st.lists(st.floats(min_value=-18, max_value=18), min_size=1, max_size=300),
    st.integers(min_value=1, max_value=5),
)
@settings(max_examples=30)
def test_s39_the_report_does_not_depend_on_the_micro_batches(logs: list[float], parts: int) -> None:
    ratios = [math.exp(v) for v in logs]
    staleness = [float(i % 8) for i in range(len(logs))]
    whole = reported(sums_of(ratios, staleness))
    cuts = np.array_split(np.arange(len(logs)), parts)
    pieces = [sums_of([ratios[i] for i in c], [staleness[i] for i in c]) for c in cuts]
    assert reported(*pieces) == pytest.approx(whole, rel=1e-9)


@given(st.lists(st.floats(min_value=1e-3, max_value=18), min_size=20, max_size=400))
@example([0.5] * 6 + [1.0] * 3 + [2.0] * 2 + [3.0] * 6 + [4.0] * 2 + [6.0])
@settings(max_examples=30)
def test_quantiles_are_exact_to_within_a_bin(sizes: list[float]) -> None:
    found = reported(sums_of([math.exp(v) for v in sizes]))
    for q, name in ((0.5, "p50"), (0.95, "p95")):
        exact = np.quantile(sizes, q, method="inverted_cdf")
        assert exact / BIN / 1.001 <= found[f"importance/log_ratio_{name}"] <= exact * BIN * 1.001


def test_an_unchanged_policy_has_quantiles_under_the_smallest_bin() -> None:
    found = reported(sums_of([1.0] * 100))
    assert 0 <= found["importance/log_ratio_p95"] <= 1e-4


def test_the_report_is_finite_for_any_finite_logprobs_and_empty_without_tokens() -> None:
    learner = torch.tensor([0.0, -1e30, -200.0, 0.0])
    sampled = torch.tensor([-1e30, 0.0, 0.0, -200.0])
    found = reported(distance_sums(learner, sampled, torch.zeros(4)))
    assert all(math.isfinite(v) for v in found.values())
    nothing = distance_sums(torch.zeros(0), torch.zeros(0), torch.zeros(0))
    assert not any(count.any() for _, count in nothing.values())
    assert set(nothing) == set(distance_sums(learner, sampled, torch.zeros(4)))
    assert reported(nothing) == {}
