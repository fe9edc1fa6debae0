"""A panel of a Grafana dashboard, and the few forms that our queries have.

`$run` is the dashboards' variable, `$__rate_interval` Grafana's own. Metrics are named as Prometheus
has them, less `ray_rlhf_`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

WIDTH = 24  # of a row, in Grafana's grid
RUN = 'run=~"$run"'

Shape = Literal["curve", "number"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`unit` is Grafana's id of a unit, such as "s" or "percentunit"; `help` says how to read it."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    help: str = ""
    shape: Shape = "curve"
    width: int = 8
    height: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """Rows of panels, each row at most `WIDTH` wide."""

    uid: str
    title: str
    help: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def panels(self) -> list[Panel]:
        return [panel for _, row in self.rows for panel in row]


def series(name: str) -> str:
    return f"ray_rlhf_{name}{{{RUN}}}"


def gauge(name: str, legend: str, how: str = "max", by: str = "run") -> Query:
    return Query(expr=f"{how} by ({by}) ({series(name)})", legend=legend)


def rate(name: str, legend: str, by: str = "run") -> Query:
    return Query(expr=f"sum by ({by}) (rate({series(name)}[$__rate_interval]))", legend=legend)


def ratio(part: str, whole: str, legend: str, by: str = "run") -> Query:
    """Of two counters: sums over sums, so that a busy worker counts for more. 0 while the part, which
    has no series before it first grows, has none."""
    above, below = (
        f"sum by ({by}) (rate({series(name)}[$__rate_interval]))" for name in (part, whole)
    )
    return Query(expr=f"({above} or 0 * {below}) / {below}", legend=legend)


def quantile(name: str, q: float, by: str = "run") -> Query:
    inner = f"sum by ({by}, le) (rate({series(f'{name}_bucket')}[$__rate_interval]))"
    return Query(expr=f"histogram_quantile({q}, {inner})", legend=f"{{{{run}}}} p{q * 100:g}")


def share(name: str, legend: str) -> Query:
    return Query(
        expr=f"max by (run) ({series(name)}) / max by (run) ({series('time_step_s')})",
        legend=legend,
    )


def number(title: str, query: Query, unit: str = "short", help: str = "") -> Panel:
    return Panel(
        title=title, queries=(query,), unit=unit, help=help, shape="number", width=4, height=4
    )


def row(title: str, *panels: Panel) -> tuple[str, tuple[Panel, ...]]:
    return title, panels
