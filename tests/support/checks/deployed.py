"""Alerts, recording rules and dashboards of deploy/, as they are committed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEPLOY = Path(__file__).parents[3] / "deploy"
BOARDS = ("rlhf-overview", "rlhf-generation", "rlhf-scoring", "rlhf-learner")
WIDTH = 24  # of a row, in Grafana's grid


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """Alert of Prometheus; `fields` has what its file says."""

    name: str
    expr: str
    severity: str
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """Expression that Prometheus evaluates once and keeps under a name."""

    name: str
    expr: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Panel of a dashboard; `fields` has what its file says."""

    title: str
    queries: tuple[Query, ...]
    fields: dict[str, Any]

    @property
    def width(self) -> int:
        return self.fields["gridPos"]["w"]

    @property
    def height(self) -> int:
        return self.fields["gridPos"]["h"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """Dashboard of Grafana: panels below the heading of their row."""

    uid: str
    rows: tuple[tuple[dict[str, Any], tuple[Panel, ...]], ...]
    fields: dict[str, Any]

    @property
    def panels(self) -> list[Panel]:
        return [panel for _, row in self.rows for panel in row]


def rules(name: str) -> list[dict[str, Any]]:
    """Read the rules of a file of deploy/prometheus; `name` is "alerts" or "recording"."""
    document = yaml.safe_load((DEPLOY / "prometheus" / f"{name}.rules.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def dashboard(uid: str) -> Dashboard:
    """Read a dashboard of deploy/grafana."""
    fields = json.loads((DEPLOY / "grafana" / "dashboards" / f"{uid}.json").read_text())
    rows: list[tuple[dict[str, Any], list[Panel]]] = []
    for each in fields["panels"]:
        if each["type"] == "row":
            rows.append((each, []))
        else:
            queries = tuple(
                Query(expr=target["expr"], legend=target["legendFormat"])
                for target in each["targets"]
            )
            rows[-1][1].append(Panel(title=each["title"], queries=queries, fields=each))
    return Dashboard(
        uid=fields["uid"],
        rows=tuple((head, tuple(panels)) for head, panels in rows),
        fields=fields,
    )


ALERTS = tuple(
    Alert(
        name=rule["alert"],
        expr=rule["expr"],
        severity=rule["labels"]["severity"],
        fields=rule,
    )
    for rule in rules("alerts")
)
RECORDED = tuple(Recorded(name=rule["record"], expr=rule["expr"]) for rule in rules("recording"))
DASHBOARDS = tuple(dashboard(uid) for uid in BOARDS)

RATE = (
    r"sum by \((?P<by{0}>[^)]*)\) \(rate\((?P<{1}>\w+){{run=~\"\$run\"}}\[\$__rate_interval\]\)\)"
)
RATIO = re.compile(
    rf"\({RATE.format(1, 'part')} or 0 \* {RATE.format(2, 'whole')}\) / {RATE.format(3, 'again')}"
)
"""Ratio of two counters as a sum over a sum, which lets a busy worker count for more. 0 while the part,
whose series begins with its first increase, has none."""


def ratios() -> dict[tuple[str, str], str]:
    """Expressions of all dashboards that divide rates, by the names of the two counters.

    Raises `AssertionError` for one that is not such a ratio.
    """
    found = {}
    for board in DASHBOARDS:
        for query in (query for panel in board.panels for query in panel.queries):
            if "rate(" in query.expr and " / " in query.expr:
                match = RATIO.fullmatch(query.expr)
                assert match is not None, f"{query.expr}: not a sum over a sum"
                assert match["whole"] == match["again"], query.expr
                assert match["by1"] == match["by2"] == match["by3"], query.expr
                found[match["part"], match["whole"]] = query.expr
    return found
