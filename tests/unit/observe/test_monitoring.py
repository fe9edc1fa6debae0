"""Alerts, recording rules and dashboards of deploy/: about metrics that exist, explained, whole."""

import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from rlhf_cluster.observe.local_prometheus import RULES
from rlhf_cluster.observe.metric_table import METRICS
from tests.support.checks.deployed import ALERTS, BOARDS, DASHBOARDS, RECORDED, WIDTH, ratios
from tests.support.checks.promql import (
    EXPRESSIONS,
    NAME,
    faults,
)

DEPLOY = Path("deploy")
RUNBOOK = Path("docs/runbook.md").read_text()


def test_every_file_is_read_and_no_other_is_committed():
    boards = {path.stem for path in (DEPLOY / "grafana" / "dashboards").iterdir()}
    assert boards == set(BOARDS) == {board.uid for board in DASHBOARDS}
    rules = {path.name for path in (DEPLOY / "prometheus").glob("*.rules.yml")}
    for path in (DEPLOY / "prometheus").glob("prometheus*.yml"):
        assert set(yaml.safe_load(path.read_text())["rule_files"]) == rules
    assert rules == {path.name for path in RULES}


@pytest.mark.parametrize("path", RULES, ids=lambda path: path.name)
def test_the_package_has_the_committed_rules(path):
    assert path.read_text() == (DEPLOY / "prometheus" / path.name).read_text()
    data = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = ".".join(path.relative_to(Path.cwd()).parent.parts)
    assert any(path.match(pattern) for pattern in data[package]), "a wheel would lack it"


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


@pytest.mark.parametrize("alert", ALERTS, ids=lambda alert: alert.name)
def test_an_alert_says_how_bad_it_is_and_what_to_read(alert):
    assert set(alert.fields) == {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+m", alert.fields["for"])
    assert alert.fields["labels"] in ({"severity": "critical"}, {"severity": "warning"})
    assert set(alert.fields["annotations"]) == {"summary", "runbook"}
    assert alert.fields["annotations"]["summary"].startswith("{{ $labels.run }}: ")
    assert alert.fields["annotations"]["runbook"] == f"docs/runbook.md#{alert.name.lower()}"


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


@pytest.mark.parametrize("uid", BOARDS)
def test_grafanas_own_sdk_reads_each_dashboard_without_loss(uid):
    register_default_plugins()
    text = (DEPLOY / "grafana" / "dashboards" / f"{uid}.json").read_text()
    board = Dashboard.from_json(json.loads(text))
    assert json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n" == text


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_every_dashboard_lets_the_reader_choose_runs_and_links_to_the_others(board):
    (variable,) = board.fields["templating"]["list"]
    assert (variable["name"], variable["multi"], variable["allValue"]) == ("run", True, ".*")
    (link,) = board.fields["links"]
    assert link["tags"] == board.fields["tags"] == ["rlhf"]
    assert link["includeVars"] is True
    for panel in board.panels:
        for query in panel.queries:
            names = NAME.findall(query.expr)
            assert query.expr.count('{run=~"$run"}') == len(names), (panel.title, query.expr)


@pytest.mark.parametrize("board", DASHBOARDS, ids=lambda board: board.uid)
def test_every_dashboard_fits_the_screen_and_names_its_series(board):
    titles = [panel.title for panel in board.panels]
    assert len(set(titles)) == len(titles)
    ids = [each["id"] for each in board.fields["panels"]]
    assert len(set(ids)) == len(ids)
    y = 0
    for head, row in board.rows:
        assert head["gridPos"] == {"x": 0, "y": y, "w": WIDTH, "h": 1}, head["title"]
        x = 0
        for panel in row:
            assert (panel.fields["gridPos"]["x"], panel.fields["gridPos"]["y"]) == (x, y + 1)
            x += panel.width
        assert x == WIDTH, head["title"]
        y += 1 + max(panel.height for panel in row)
    for panel in board.panels:
        letters = [target["refId"] for target in panel.fields["targets"]]
        assert letters == list("ABCDEFGH"[: len(letters)]), panel.title
        for query in panel.queries:
            labels = set(re.findall(r"by \(([^)]*)\)", query.expr)[-1:])
            grouped = {part.strip() for found in labels for part in found.split(",")}
            for shown in re.findall(r"{{(\w+)}}", query.legend):
                assert shown in grouped or not grouped, (panel.title, shown)


def test_s39_a_ratio_on_a_dashboard_is_a_sum_over_a_sum():
    found = dict(ratios().keys())
    assert found == {
        f"ray_rlhf_generation_{part}": f"ray_rlhf_generation_{whole}"
        for part, whole in {
            "prefix_hit_tokens_total": "prefix_tokens_total",
            "draft_accepted_tokens_total": "draft_tokens_total",
        }.items()
    }


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
