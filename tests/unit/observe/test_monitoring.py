"""Alerts, recording rules and dashboards: made from code, about metrics that exist, explained."""

import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from rlhf_cluster.observe.metrics.metric_table import METRICS
from rlhf_cluster.observe.monitoring.alerts import (
    ALERTS,
    RECORDED,
)
from rlhf_cluster.observe.monitoring.grafana_dashboards import DASHBOARDS, WIDTH
from tests.support.checks.promql import (
    EXPRESSIONS,
    faults,
)

DEPLOY = Path("deploy")
RUNBOOK = Path("docs/runbook.md").read_text()


def generator():
    spec = importlib.util.spec_from_file_location("generate", DEPLOY / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_files_are_those_that_the_code_makes():
    made = generator().files()
    for name, text in made.items():
        assert (DEPLOY / name).read_text() == text, f"{name}: run python deploy/generate.py"
    there = [
        *(DEPLOY / "prometheus").rglob("*.yml"),
        *(DEPLOY / "grafana/dashboards").iterdir(),
        *(DEPLOY / "kuberay").rglob("*.yaml"),
    ]
    assert {path.relative_to(DEPLOY) for path in there} == set(made), "a file that nobody makes"


@pytest.mark.parametrize(("where", "expr"), EXPRESSIONS)
def test_every_expression_is_about_metrics_that_exist(where, expr):
    assert faults(expr) == []


@pytest.mark.parametrize(
    ("expr", "fault"),
    [
        ("max(ray_rlhf_rewrd_mean)", "not in the table"),
        ("max by (run) (ray_rlhf_generation_tokens_total)", "needs rate"),
        ("rate(ray_rlhf_reward_mean[5m])", "a gauge"),
        ("rate(ray_rlhf_generation_group_s[5m])", "a histogram needs"),
        ("max by (run) (ray_rlhf_generation_group_s_sum)", "needs rate"),
        ("max by (run, worker) (ray_rlhf_reward_mean)", "grouped by 'worker'"),
        ("max by (run) (rlhf:generation_tokens:rate1m)", "not in the table"),
        ("max by (worker) (rlhf:scoring_failing:fraction10m)", "grouped by 'worker'"),
        ('ray_rlhf_reward_mean{pool="x"}', "no label 'pool'"),
        ("1 + 1", "no metric of ours"),
    ],
)
def test_a_wrong_expression_is_found(expr, fault):
    assert any(fault in found for found in faults(expr)), faults(expr)


def test_names_of_alerts_and_rules_are_their_own():
    names = [x.name for x in (*ALERTS, *RECORDED)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[A-Z][A-Za-z]+", alert.name) for alert in ALERTS)
    assert all(metric.prometheus_name not in names for metric in METRICS.values())


def test_every_alert_has_its_section_in_the_runbook_and_no_other_has():
    sections = dict(re.findall(r"^## (\w+)\n(.*?)(?=^## |\Z)", RUNBOOK, re.M | re.S))
    assert list(sections) == [alert.name for alert in ALERTS]
    for name, text in sections.items():
        assert re.findall(r"^\*\*(\w+):\*\*", text, re.M) == ["Means", "Look", "Do"], name


def test_the_runbook_names_settings_and_commands_that_exist():
    from rlhf_cluster.config import RunConfig

    sections = RunConfig.model_fields
    for name in re.findall(r"`([a-z]+\.[a-z_]+)(?: = [^`]+)?`", RUNBOOK):
        section, _, key = name.partition(".")
        if (section, key) == ("post_mortem", "json"):
            continue
        fields = getattr(sections[section].annotation, "model_fields", None)
        assert fields is not None, name
        assert key in fields, name


def test_every_dashboard_fits_the_screen_and_names_its_series():
    assert len({board.uid for board in DASHBOARDS}) == len(DASHBOARDS)
    for board in DASHBOARDS:
        titles = [panel.title for panel in board.panels]
        assert len(set(titles)) == len(titles)
        for _, row in board.rows:
            assert sum(panel.width for panel in row) == WIDTH
        for panel in board.panels:
            for query in panel.queries:
                labels = set(re.findall(r"by \(([^)]*)\)", query.expr)[-1:])
                grouped = {part.strip() for found in labels for part in found.split(",")}
                for shown in re.findall(r"{{(\w+)}}", query.legend):
                    assert shown in grouped or not grouped, (panel.title, shown)


def test_the_overview_fits_one_screen():
    overview = DASHBOARDS[0]
    rows = [1 + max(panel.height for panel in row) for _, row in overview.rows]
    assert sum(rows) <= 27, "30 pixels each and a gap: more than a screen of 1080 holds"


def test_compose_names_files_that_exist_and_pins_its_images():
    compose = yaml.safe_load((DEPLOY / "compose.yml").read_text())
    assert set(compose["services"]) == {"prometheus", "grafana"}
    for service in compose["services"].values():
        assert re.fullmatch(r"[a-z]+/[a-z]+:v?\d+\.\d+\.\d+", service["image"])
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("./"):
                assert (DEPLOY / source).is_dir(), source
            elif not source.startswith("/"):
                assert source in compose["volumes"]


def test_grafana_is_provisioned_with_the_source_that_the_panels_name():
    folder = DEPLOY / "grafana" / "provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text())["datasources"]
    for path in (DEPLOY / "grafana" / "dashboards").glob("*.json"):
        uids = re.findall(r'"type": "prometheus",\s*"uid": "(\w+)"', path.read_text())
        assert set(uids) == {source["uid"]}
