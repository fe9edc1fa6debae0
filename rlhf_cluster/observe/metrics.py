"""Metrics of a process: every value is checked against the table and handed to a sender.

Promises: a name that is not in `rlhf_cluster.observe.metric_table` is a `MetricError`, so that a
misspelt metric cannot get lost.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from rlhf_cluster.errors import MetricError
from rlhf_cluster.observe.metric_table import Kind, Metric, find, label_value
from rlhf_cluster.records import GroupSummary


class Sender(Protocol):
    """Destination of checked values. `actors.cluster.ray_metrics` is Prometheus, through Ray."""

    def send(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        """Send the value of a gauge or histogram, or the increase of a counter."""
        ...


class Metrics:
    """Checked metrics of one process. Safe for several threads.

    Values that are not finite are not sent: a gap in a graph is right, a NaN spoils every sum.
    """

    def __init__(self, sender: Sender) -> None:
        self._sender = sender
        self._totals: dict[str, float] = {}
        self._lock = threading.Lock()  # guards memory only: nothing is waited for inside

    def gauge(self, name: str, value: float) -> None:
        self._send(name, Kind.GAUGE, value)

    def count(self, name: str, increase: float = 1.0) -> None:
        """Add `increase`, which must not be negative, to a counter."""
        if increase < 0:
            raise MetricError(f"counter {name!r}: increase {increase:g} is negative; counters grow")
        self._send(name, Kind.COUNTER, increase)

    def count_up_to(self, name: str, total: float) -> None:
        """Bring a counter to `total`. A smaller total than before means that its source restarted."""
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


_TOTALS = {
    "cache_hits": "scoring/cache_hits_total",
    "cache_misses": "scoring/cache_misses_total",
    "watched_errors": "scoring/watched_errors_total",
}


def scoring_totals(stats: Mapping[str, float]) -> dict[str, float]:
    """Return the totals (`ScoringWorker.stats`) that are counters, by the counter's name."""
    found = {}
    for key, total in stats.items():
        kind, slash, reward = key.partition("/")
        if kind in _TOTALS:
            found[_TOTALS[kind] + slash + reward] = total
    return found


def part_means(summaries: Sequence[GroupSummary], metric: str) -> dict[str, float]:
    """Return `<metric>/<part>`: the mean over the rollouts of the groups that have the part."""
    sums: dict[str, tuple[float, int]] = {}
    for summary in summaries:
        for name, mean in summary.parts.items():
            total, count = sums.get(name, (0.0, 0))
            sums[name] = (total + mean * summary.num_rollouts, count + summary.num_rollouts)
    return {f"{metric}/{name}": total / count for name, (total, count) in sums.items()}
