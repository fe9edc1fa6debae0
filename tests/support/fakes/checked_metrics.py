"""Metrics that check what they are given, and send it nowhere."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_cluster.observe.metric_table import Metric
from rlhf_cluster.observe.metrics import Metrics


class _Nowhere:
    def send(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        pass


class CheckedMetrics(Metrics):
    """Raises on a name or a kind that is not in the table."""

    def __init__(self) -> None:
        super().__init__(_Nowhere())
