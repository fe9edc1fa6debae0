"""The alert rules in Prometheus' own evaluator: each fires when it should and not otherwise.

promtool is part of Prometheus (`make promtool` fetches Debian's); without it these tests are skipped.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.support.builders.alert_series import (
    CASES,
    HEALTHY,
    Case,
    Series,
)
from tests.support.checks.deployed import ALERTS

DEPLOY = Path(__file__).parents[2] / "deploy" / "prometheus"
FETCHED = Path(__file__).parents[2] / ".venv" / "prometheus" / "usr" / "bin" / "promtool"
PROMTOOL = (
    os.environ.get("PROMTOOL")
    or shutil.which("promtool")
    or (str(FETCHED) if FETCHED.exists() else None)
)
pytestmark = pytest.mark.skipif(
    PROMTOOL is None, reason="promtool is not installed: make promtool, or PROMTOOL=/path/to/it"
)


def promtool(*arguments: str | Path) -> str:
    done = subprocess.run(
        [str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def input_series(series: Series) -> list[dict[str, str]]:
    rows = []
    for name, values in series.items():
        name, _, labels = name.removesuffix("}").partition("{")
        labels = ",".join(['run="r"', *([labels] if labels else [])])
        rows.append({"series": f"ray_rlhf_{name}{{{labels}}}", "values": values})
    return rows


def evaluation(series: Series, at: int, expected: dict[str, list[dict[str, str]]]) -> dict:
    return {
        "interval": "1m",
        "input_series": input_series(series),
        "alert_rule_test": [
            {
                "eval_time": f"{at}m",
                "alertname": name,
                "exp_alerts": [{"exp_labels": labels} for labels in alerts],
            }
            for name, alerts in expected.items()
        ],
    }


def both(name: str, case: Case) -> list[dict]:
    severity = {alert.name: alert.severity for alert in ALERTS}[name]
    fired = {"run": "r", "severity": severity, **case.labels}
    return [
        evaluation(case.fires, case.at, {name: [fired]}),
        evaluation(case.silent, case.at, {name: []}),
    ]


@pytest.fixture
def judge(tmp_path):
    """Runs tests against the committed rules, without what they say to people."""
    for path in DEPLOY.glob("*.rules.yml"):
        rules = yaml.safe_load(path.read_text())
        for rule in rules["groups"][0]["rules"]:
            rule.pop("annotations", None)
        (tmp_path / path.name).write_text(yaml.safe_dump(rules))

    def run(tests: list[dict]) -> str:
        document = {
            "rule_files": ["recording.rules.yml", "alerts.rules.yml"],
            "evaluation_interval": "1m",
            "tests": tests,
        }
        (tmp_path / "tests.yml").write_text(yaml.safe_dump(document))
        return promtool("test", "rules", tmp_path / "tests.yml")

    return run


def test_prometheus_accepts_the_files():
    for path in DEPLOY.glob("prometheus*.yml"):
        assert "SUCCESS" in promtool("check", "config", path)


def test_every_alert_has_a_case():
    assert list(CASES) == [alert.name for alert in ALERTS]


@pytest.mark.parametrize("name", CASES)
def test_it_fires_when_it_should_and_not_otherwise(name, judge):
    assert "SUCCESS" in judge(both(name, CASES[name]))


def test_no_alert_fires_in_an_undisturbed_run(judge):
    silent = {alert.name: [] for alert in ALERTS}
    assert "SUCCESS" in judge([evaluation(HEALTHY, at, silent) for at in (5, 40, 115)])


def test_an_ended_run_is_silent(judge):
    ended = {name: values + " stale" for name, values in HEALTHY.items()}
    silent = {alert.name: [] for alert in ALERTS}
    assert "SUCCESS" in judge([evaluation(ended, 200, silent)])
