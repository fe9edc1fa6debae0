"""How the expression of an alert is taken apart."""

import pytest

from tests.support.checks.deployed import ALERTS
from tests.support.checks.promql import NAME
from tests.support.checks.promql_operands import operands


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        ("max by (run) (a) > 3", ["max by (run) (a)"]),
        ("(max by (run) (a) >= b) > c", ["max by (run) (a)", "b", "c"]),
        ("(a) > (b)", ["a", "b"]),
        ("a > 0 and (abs(b) > 0.5 * c offset 1h)", ["a", "abs(b)", "0.5 * c"]),
        (
            "a > on (run) group_left () 2 * quantile by (run) (0.5, a)",
            ["a", "2 * quantile by (run) (0.5, a)"],
        ),
        ("sum by (run) (a - (a offset 2h or 0 * a)) > 0", ["sum by (run) (a - (a or 0 * a))"]),
        (
            "min by (run) (a) < 0.05 or min by (run) (predict_linear(a[1h], 4 * 3600)) < 0",
            ["min by (run) (a)", "min by (run) (predict_linear(a[1h], 4 * 3600))"],
        ),
        ('max by (run) (a{staleness="0"}) > 0.05', ['max by (run) (a{staleness="0"})']),
    ],
)
def test_operands_are_what_is_compared(expr, expected):
    assert operands(expr) == expected


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_no_metric_of_an_alert_is_lost(alert):
    found = operands(alert.expr)
    assert {name for part in found for name in NAME.findall(part)} == set(NAME.findall(alert.expr))
    assert all(NAME.search(part) for part in found)
    assert not any(" offset " in part for part in found)
