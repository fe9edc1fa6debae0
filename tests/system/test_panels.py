"""What panels divide, in Prometheus' own evaluator: sums over sums (S39), and 0 where a part has no
series. Skipped without promtool, as the tests of alerts are.
"""

from collections.abc import Callable

import pytest
import yaml

from tests.support.checks.deployed import ratios
from tests.system.test_alerts import PROMTOOL, promtool

pytestmark = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: make promtool")
HIT, ASKED = "generation_prefix_hit_tokens_total", "generation_prefix_tokens_total"
Judge = Callable[[dict[str, str], float], str]


@pytest.fixture
def judge(tmp_path) -> Judge:
    """Says whether the hits of the given series, a value a minute, are the expected share."""

    def run(series: dict[str, str], expected: float) -> str:
        expr = ratios()[f"ray_rlhf_{HIT}", f"ray_rlhf_{ASKED}"]
        document = {
            "evaluation_interval": "1m",
            "tests": [
                {
                    "interval": "1m",
                    "input_series": [
                        {"series": f"ray_rlhf_{name[:-1]},run='r'}}", "values": values}
                        for name, values in series.items()
                    ],
                    "promql_expr_test": [
                        {
                            "expr": expr.replace("$run", "r").replace("$__rate_interval", "5m"),
                            "eval_time": "10m",
                            "exp_samples": [{"labels": '{run="r"}', "value": expected}],
                        }
                    ],
                }
            ],
        }
        (tmp_path / "tests.yml").write_text(yaml.safe_dump(document))
        return promtool("test", "rules", tmp_path / "tests.yml")

    return run


TWO_WORKERS = {
    f"{ASKED}{{worker='a'}}": "0+90x20",
    f"{HIT}{{worker='a'}}": "0+80x20",
    f"{ASKED}{{worker='b'}}": "0+10x20",
    f"{HIT}{{worker='b'}}": "0+1x20",
}


def test_s39_the_busy_worker_counts_for_more(judge: Judge):
    assert "SUCCESS" in judge(TWO_WORKERS, 0.81)
    with pytest.raises(AssertionError, match="FAILED"):
        judge(TWO_WORKERS, (80 / 90 + 1 / 10) / 2)


def test_no_hit_yet_is_nought_and_not_a_gap(judge: Judge):
    asked = {name: values for name, values in TWO_WORKERS.items() if ASKED in name}
    assert "SUCCESS" in judge(asked, 0)
    one = {f"{HIT}{{worker='a'}}": "0+80x20", **asked}
    assert "SUCCESS" in judge(one, 0.8)
