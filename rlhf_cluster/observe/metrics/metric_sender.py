"""What this project measures, and how values are sent.

Promises: a metric has one name, `area/quantity_unit`, in `rlhf_cluster.observe.metrics.metric_table`
and nowhere else; in metrics.jsonl it has this name, in Prometheus `rlhf_area_quantity_unit`. Whoever
sends or writes a name that is not in the table gets a `MetricError`, so a misspelt metric cannot get
lost. A labelled metric is written `area/quantity_unit/label value` where names are flat
(metrics.jsonl).
"""

from __future__ import annotations

import difflib
import math
import threading
from collections.abc import Mapping
from typing import Protocol

from rlhf_cluster.errors import MetricError
from rlhf_cluster.observe.metrics.metric import (
    Kind,
    Metric,
)
from rlhf_cluster.observe.metrics.metric_table import METRICS


def find(name: str) -> Metric:
    """The metric that `name` (with or without a label value) belongs to. `MetricError` if none."""
    metric = METRICS.get(name)
    if metric is not None and metric.label is None:
        return metric
    stem, _, value = name.rpartition("/")
    labelled = METRICS.get(stem)
    if labelled is not None and labelled.label is not None and value:
        return labelled
    if metric is not None:
        raise MetricError(f"metric {name!r} needs a label: write {name}/<{metric.label}>")
    close = difflib.get_close_matches(name, list(METRICS), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise MetricError(
        f"unknown metric {name!r}{hint}. Add a new one to rlhf_cluster/observe/metrics/metric_table.py"
    )


def label_value(name: str) -> dict[str, str]:
    """The label in a flat name: {"part": "exact_match"} of "reward/part/exact_match", else {}."""
    metric = find(name)
    return {metric.label: name[len(metric.name) + 1 :]} if metric.label else {}


def docs_table() -> str:
    """The table as Markdown."""
    lines = [
        "| name | Prometheus name | kind | unit | role | label | meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{m.name}` | `{m.prometheus_name}` | {m.kind} | {m.unit} | {m.role} | "
        f"{m.label or ''} | {m.help} |"
        for m in METRICS.values()
    ]
    return "\n".join(lines) + "\n"


class Sender(Protocol):
    """Where checked values go. `actors.cluster.ray_metrics` sends them to Prometheus through Ray."""

    def send(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Gauges and histograms take the value, counters the increase."""
        ...


class Metrics:
    """Checks every value against the table and hands it to a sender.

    Values that are not finite are left out: a gap in a graph is right, a NaN spoils every sum.
    Safe for several threads.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._totals: dict[str, float] = {}
        self._lock = threading.Lock()  # guards memory only: nobody waits under it

    def gauge(self, name: str, value: float) -> None:
        self._send(name, Kind.GAUGE, value)

    def count(self, name: str, increase: float = 1.0) -> None:
        """Add `increase`, which must not be negative, to a counter."""
        if increase < 0:
            raise MetricError(f"counter {name!r}: increase {increase:g} is negative; counters grow")
        self._send(name, Kind.COUNTER, increase)

    def count_up_to(self, name: str, total: float) -> None:
        """Bring a counter to `total`. A smaller total than before means its source started anew."""
        with self._lock:
            before = self._totals.get(name, 0.0)
            self._totals[name] = total
        self.count(name, total - before if total >= before else total)

    def observe(self, name: str, value: float) -> None:
        self._send(name, Kind.HISTOGRAM, value)

    def record(self, values: Mapping[str, float]) -> None:
        """Send a whole step: gauges and histograms as they are, counters as totals."""
        for name, value in values.items():
            kind = find(name).kind
            if kind is Kind.COUNTER:
                self.count_up_to(name, value)
            else:
                self._send(name, kind, value)

    def _send(self, name: str, kind: Kind, value: float) -> None:
        metric = find(name)
        if metric.kind is not kind:
            raise MetricError(f"metric {name!r} is a {metric.kind}, it was sent as a {kind}")
        if math.isfinite(value):
            with self._lock:
                self._sender.send(metric, value, label_value(name))
