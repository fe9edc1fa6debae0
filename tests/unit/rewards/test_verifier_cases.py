"""The cases that the verifiers are measured on: enough of them, and halves that share nothing."""

import pytest

from benchmarks.verifier_cases import formula_cases, half_of, numeric_cases
from benchmarks.verifier_targets import formulas


@pytest.mark.parametrize("cases", [numeric_cases, formula_cases])
def test_l01_the_counted_half_has_enough_cases_and_shares_no_template_or_target(cases):
    work, counted = (list(cases(0, half)) for half in ("work", "counted"))
    assert sum(case.variant == "right" for case in counted) >= 2000
    assert sum(case.variant != "right" for case in counted) >= 3000
    assert not {case.template for case in work} & {case.template for case in counted}
    assert not {(c.target, c.completion) for c in work} & {
        (c.target, c.completion) for c in counted
    }


def test_l01_there_are_300_formulas_and_both_halves_have_a_hundred():
    targets = [formula.target for formula in formulas(0)]
    assert len(set(targets)) == len(targets) >= 300
    assert min(sum(half_of(t) == half for t in targets) for half in ("work", "counted")) >= 100


def test_l01_the_same_seed_makes_the_same_cases():
    assert list(numeric_cases(3, "work", each=2)) == list(numeric_cases(3, "work", each=2))
    assert list(numeric_cases(3, "work", each=2)) != list(numeric_cases(4, "work", each=2))
