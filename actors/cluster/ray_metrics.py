"""Metrics of Ray workers, sent to Prometheus through Ray's agent on every node.

For use inside a Ray worker or driver only. Ray removes the gauge of a dead worker. A counter of its
replacement starts at 0 with a new worker id, so graphs use rate() and aggregate over WorkerId. Ray adds
the prefix `ray_` to every name, and `_total` to counters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray.util import metrics as ray_metrics

from rlhf_cluster.observe.metric_table import (
    Kind,
    Metric,
)
from rlhf_cluster.observe.metrics import Metrics


class RayMetrics(Metrics):
    """Metrics whose values carry `labels`, such as {"worker": "generation-0"}, and the role."""

    def __init__(self, role: str, labels: Mapping[str, str]) -> None:
        super().__init__(_RaySender({"role": role, **labels}))


class _RaySender:
    def __init__(self, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._made: dict[str, Any] = {}

    def send(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        if metric.name not in self._made:
            self._made[metric.name] = self._make(metric)
        instrument = self._made[metric.name]
        tags = {**self._labels, **labels}
        if metric.kind is Kind.GAUGE:
            instrument.set(value, tags=tags)
        elif metric.kind is Kind.HISTOGRAM:
            instrument.observe(value, tags=tags)
        elif value > 0:
            instrument.inc(value, tags=tags)

    def _make(self, metric: Metric) -> Any:
        keys = (*self._labels, *((metric.label,) if metric.label else ()))
        name, help_text = metric.prometheus_name, f"{metric.help} [{metric.unit}]"
        if metric.kind is Kind.GAUGE:
            return ray_metrics.Gauge(name, help_text, tag_keys=keys)
        if metric.kind is Kind.HISTOGRAM:
            return ray_metrics.Histogram(name, help_text, list(metric.buckets), tag_keys=keys)
        # Ray appends _total to every counter.
        return ray_metrics.Counter(name.removesuffix("_total"), help_text, tag_keys=keys)
