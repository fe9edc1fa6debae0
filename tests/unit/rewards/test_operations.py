"""How many operations a formula has as it is written."""

import pytest

from rlhf_cluster.rewards.rules.math_spelling import operations, spare_operations


@pytest.mark.parametrize(
    ("target", "restated"),
    [
        (r"3\sqrt{2}", r"\sqrt{2}+\sqrt{8}"),
        (r"\ln 2", r"\ln 4-\ln 2"),
        ("2^{100}", r"2^{50}\cdot 2^{50}"),
        ("15x+3", "14x+x+3"),
        (r"5\pm\sqrt{3}", r"\frac{10\pm 2\sqrt{3}}{2}"),
        (r"\frac{\pi}{4}", r"\frac{\pi}{8}+\frac{\pi}{8}"),
        (r"\{1, 2\}", r"\{1, 5-3\}"),
    ],
)
def test_l08_a_restated_formula_has_more_operations(target, restated):
    assert operations(restated) > operations(target) + spare_operations(target)


@pytest.mark.parametrize(
    ("target", "written"),
    [
        ("x/2", r"\frac{1}{2}x"),
        ("1-x", "-x+1"),
        (r"\frac{1+\sqrt{5}}{2}", r"\frac{1}{2}+\frac{\sqrt{5}}{2}"),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}"),
        (r"\sqrt{12}", r"2\sqrt{3}"),
        ("1/x", "x^{-1}"),
        ("2^{1/3}", r"\sqrt[3]{2}"),
        ("x_1+1", r"x_{1} + 1 \text{ cm}"),
        (r"\frac{4}{3-\sqrt{2}}", r"\frac{12+4\sqrt{2}}{7}"),
    ],
)
def test_l08_another_way_of_writing_has_no_more(target, written):
    assert operations(written) <= operations(target) + spare_operations(target)


@pytest.mark.parametrize("written", ["48+24/1/1/1/1", "1/1/1/1*(48+24)", "48/1/1+24/1/1/1/1"])
def test_denominators_of_one_hide_no_operation(written):
    assert operations(written) > operations("72") + spare_operations("72")


def test_l08_text_that_is_made_to_be_slow_is_counted_in_time():
    for piece in (
        r"\frac{",
        "{",
        r"\frac{1}{",
        r"\sqrt{4}",
        "1/",
        "_{",
        r"\text{",
        "^{ ",
        r"\frac{{}",
    ):
        assert 0 <= operations(piece * 20_000) <= 20_000 * len(piece), piece
        spare_operations(piece * 5_000)
