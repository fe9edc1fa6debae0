"""What a row of the table of metrics is, and short ways to write one."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Kind(StrEnum):
    GAUGE = "gauge"  # a current value
    COUNTER = "counter"  # a sum that only grows; name ends in _total
    HISTOGRAM = "histogram"  # a distribution of single values


class Role(StrEnum):
    """The service that a metric comes from."""

    CONTROLLER = "controller"
    GENERATION = "generation"
    SCORING = "scoring"
    BUFFER = "buffer"
    LEARNER = "learner"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table. `unit` is "1" for a number without one; `label` splits the metric."""

    name: str
    kind: Kind
    unit: str
    help: str
    role: Role
    label: str | None = None
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        return "rlhf_" + self.name.replace("/", "_")


def gauge(name: str, unit: str, role: Role, help: str, label: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, unit=unit, help=help, role=role, label=label)


def counter(name: str, unit: str, role: Role, help: str, label: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, unit=unit, help=help, role=role, label=label)


def times(name: str, role: Role, help: str) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, unit="s", help=help, role=role, buckets=SECONDS)
