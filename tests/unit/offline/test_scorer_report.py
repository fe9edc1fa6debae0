"""The validation report against numbers from textbooks and by hand."""

import math

import numpy as np
import pytest

from rlhf_cluster.errors import RecordError
from rlhf_cluster.offline.scorer_report import (
    calibration_error,
    spearman,
    validation_report,
    wilson_interval,
)


def test_the_wilson_interval_is_that_of_the_textbook() -> None:
    # 15 of 20 (Newcombe 1998 gives such tables): (p + z^2/2n +- z sqrt(...)) / (1 + z^2/n)
    low, high = wilson_interval(15, 20)
    assert (low, high) == (pytest.approx(0.5313, abs=1e-4), pytest.approx(0.8881, abs=1e-4))
    low, high = wilson_interval(0, 10)
    assert low == 0.0
    assert high == pytest.approx(3.8416 / (10 + 3.8416), abs=1e-4)
    assert wilson_interval(10, 10) == (pytest.approx(1 - high), pytest.approx(1.0))


def test_the_wilson_interval_holds_the_true_share_about_95_times_in_100() -> None:
    draw, share, num = np.random.default_rng(0), 0.62, 80
    hits = draw.binomial(num, share, size=2000)
    bounds = [wilson_interval(float(k), num) for k in hits]
    covered = np.mean([low <= share <= high for low, high in bounds])
    assert 0.93 < covered < 0.97


def test_spearman_is_one_of_ranks_with_ties_at_their_mean() -> None:
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([10.0, 100, 1000, 10000])) == pytest.approx(
        1
    )
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])) == pytest.approx(-1)
    # ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: covariance 4.5, variances 4.5 and 5
    tied = spearman(np.array([1.0, 2, 2, 3]), np.array([1.0, 3, 2, 4]))
    assert tied == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert spearman(np.ones(4), np.arange(4.0)) is None


def test_calibration_is_the_weighted_gap_of_the_bins() -> None:
    confidences = np.array([0.55, 0.55, 0.95, 0.95])
    right = np.array([1.0, 0.0, 1.0, 1.0])
    # two bins of two: gaps 0.05 and -0.05
    assert calibration_error(confidences, right) == pytest.approx(0.05)
    assert calibration_error(np.ones(3), np.ones(3)) == 0.0


def test_the_report_of_four_pairs_is_the_one_worked_out_by_hand() -> None:
    chosen = np.array([2.0, 1.0, 0.0, 0.5])
    rejected = np.array([0.0, 1.0, 1.0, 0.0])
    lengths = np.array([4, 5, 6, 7]), np.array([3, 2, 9, 1])
    report = validation_report(chosen, rejected, *lengths)
    assert (report.num_pairs, report.num_ties) == (4, 1)
    assert report.accuracy == pytest.approx(2.5 / 4)
    assert report.accuracy_low < 0.5 < report.accuracy_high
    wrong = [1 / (1 + math.exp(m)) for m in (2.0, 0.0, -1.0, 0.5)]
    assert report.brier == pytest.approx(sum(w * w for w in wrong) / 4)
    assert report.margin_mean == pytest.approx(1.5 / 4)
    assert any("do not tell the scorer from a coin" in w for w in report.warnings)
    assert report.as_dict()["accuracy"] == report.accuracy


def test_a_scorer_of_lengths_is_warned_about_and_one_that_is_not_is_not() -> None:
    draw = np.random.default_rng(3)
    lengths = draw.integers(1, 100, (2, 400))
    by_length = validation_report(lengths[0] / 10, lengths[1] / 10, lengths[0], lengths[1])
    assert by_length.length_correlation == pytest.approx(1.0)
    assert any("may prefer longer responses" in w for w in by_length.warnings)
    noise = draw.normal(size=(2, 400))
    fair = validation_report(noise[0] + 2, noise[1], lengths[0], lengths[1])
    assert fair.length_correlation is not None
    assert abs(fair.length_correlation) < 0.15
    assert fair.warnings == ()


def test_a_scorer_that_knows_the_odds_is_calibrated_and_one_that_boasts_is_not() -> None:
    draw = np.random.default_rng(0)
    margins = draw.normal(size=20_000) * 1.5
    flipped = draw.random(20_000) > 1 / (1 + np.exp(-margins))
    truth = np.where(flipped, -margins, margins)  # the chosen one won with that chance
    zeros, lengths = np.zeros_like(truth), np.arange(20_000)
    honest = validation_report(truth, zeros, lengths, lengths)
    boasting = validation_report(truth * 4, zeros, lengths, lengths)
    assert honest.ece < 0.02 < 0.1 < boasting.ece
    assert honest.brier < boasting.brier


def test_order_does_not_matter() -> None:
    draw = np.random.default_rng(1)
    scores, lengths = draw.normal(size=(2, 50)), draw.integers(1, 20, (2, 50))
    order = draw.permutation(50)
    one = validation_report(*scores, *lengths)
    other = validation_report(*scores[:, order], *lengths[:, order])
    assert one.accuracy == other.accuracy
    assert one.ece == pytest.approx(other.ece)
    assert one.length_correlation == pytest.approx(other.length_correlation)


def test_scores_that_are_no_numbers_are_refused_not_left_out() -> None:
    lengths = np.array([1, 2])
    with pytest.raises(RecordError, match="1 of 4 scores are not finite"):
        validation_report(np.array([1.0, np.nan]), np.zeros(2), lengths, lengths)
    with pytest.raises(RecordError, match="scores and lengths of the same pairs"):
        validation_report(np.zeros(2), np.zeros(3), lengths, lengths)
    with pytest.raises(RecordError, match="scores and lengths of the same pairs"):
        validation_report(np.zeros(0), np.zeros(0), lengths[:0], lengths[:0])
