"""A real Prometheus scrapes a real run: every query of the dashboards has an answer, and what the
alerts look at is there.

Prometheus comes with promtool (`make promtool`); without it this test is skipped.
"""

import json
import os
import shutil
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.support.checks.deployed import ALERTS, DASHBOARDS, RECORDED
from tests.support.checks.promql import (
    NOT_IN_A_PLAIN_RUN,
    looked_at,
    series_behind,
)
from tests.support.checks.promql_operands import operands
from tests.support.processes.free_ports import free_ports

REPOSITORY = Path(__file__).parents[2]
FETCHED = REPOSITORY / ".venv" / "prometheus" / "usr" / "bin" / "prometheus"
PROMETHEUS = (
    os.environ.get("PROMETHEUS")
    or shutil.which("prometheus")
    or (str(FETCHED) if FETCHED.exists() else None)
)
pytestmark = pytest.mark.skipif(
    PROMETHEUS is None, reason="Prometheus is not installed: make promtool fetches it"
)
Ask = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def ask(ray_address: str, tmp_path: Path) -> Iterator[Ask]:
    """Ask a Prometheus that scrapes the cluster every second, with our rules."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    targets = [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in nodes]
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(REPOSITORY / "deploy" / "prometheus" / "*.rules.yml")],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    with (tmp_path / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            [
                str(PROMETHEUS),
                f"--config.file={tmp_path / 'prometheus.yml'}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address={address}",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def answer(expr: str) -> list[dict[str, Any]]:
        url = f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': expr})}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return json.load(reply)["data"]["result"]

    try:
        wait_until(lambda: answers(answer), (tmp_path / "prometheus.log").read_text)
        yield answer
    finally:
        server.kill()
        server.wait(10)


def answers(ask: Ask) -> bool:
    try:
        return bool(ask("up"))
    except OSError:
        return False


def wait_until(
    condition: Callable[[], bool], why: Callable[[], object], timeout_s: float = 120
) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, why()
        time.sleep(0.5)


def test_every_query_has_an_answer_and_every_alert_its_operands_and_none_fires(start_run, ask):
    run = start_run(run={"steps": 400, "groups_per_step": 4}, generation={"workers": 2})
    run.script(generate_delay_s=0.15)
    name = run.wait_for(lambda s: s.step >= 5, "five steps").run
    queries = {
        query.expr.replace("$run", name).replace("$__rate_interval", "1m")
        for board in DASHBOARDS
        for panel in board.panels
        for query in panel.queries
    }
    expected = {expr for expr in queries if not series_behind(expr) & NOT_IN_A_PLAIN_RUN.keys()}
    assert len(expected) > 50

    compared = {
        part
        for expr in (*(alert.expr for alert in ALERTS), *(rule.name for rule in RECORDED))
        for part in operands(expr)
        if not series_behind(part) & NOT_IN_A_PLAIN_RUN.keys()
    }
    assert len(compared) > 15
    told = {f'{series}{{run="{name}"}}' for series in looked_at() - NOT_IN_A_PLAIN_RUN.keys()}

    def of_run(expr: str) -> bool:
        return any(answer["metric"].get("run") == name for answer in ask(expr))

    def empty() -> list[str]:
        silent = [expr for expr in compared | told if not of_run(expr)]
        return sorted([*silent, *(expr for expr in expected if not ask(expr))])

    wait_until(lambda: not empty(), empty)
    for alert in ALERTS:
        ask(alert.expr)  # is understood
    firing = ask('ALERTS{alertstate="firing"}')
    assert [alert for alert in firing if alert["metric"].get("run", name) == name] == []
    run.process.kill()
    wait_until(
        lambda: not ask(f'ray_rlhf_step_number{{run="{name}"}}'), lambda: "a dead run's series stay"
    )
