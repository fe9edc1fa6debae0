"""Whether what was measured over many steps is flat: a robust slope of each series, against a bound.

The first third of the steps is left out: caches fill, allocators warm up. Over the rest the slope is
that of Theil and Sen, the median of the slopes of all pairs of samples, which neither a few peaks nor a
noisy start can move. What is wrong is a sentence, never an exception.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEFT_OUT = 1 / 3
FEWEST = 10
"""Samples of a series, below which nothing is said of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """All that was measured at one moment: values by series, such as `files/driver`."""

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Of one series: `slope` is per 1,000 steps, and `late` the same of the later half of the samples
    that count: of what fills up it is the smaller one, of a leak it is not. `first` and `last` are
    medians of tenths of the samples that count, `peak` is the largest of all samples."""

    slope: float
    late: float
    first: float
    last: float
    peak: float
    samples: int


def theil_sen(x: Sequence[float], y: Sequence[float]) -> float:
    """The median slope over all pairs of points whose `x` differ; NaN where no two do.

    Theil 1950, Sen 1968: up to 29 % of the points may lie anywhere.
    """
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    first, second = np.triu_indices(len(xs), k=1)
    run, rise = xs[second] - xs[first], ys[second] - ys[first]
    return float(np.median(rise[run != 0] / run[run != 0])) if run.any() else float("nan")


def tail(samples: Sequence[Sample], steps: int) -> list[Sample]:
    """Those that count."""
    return [sample for sample in samples if sample.step >= steps * LEFT_OUT]


def trends(samples: Sequence[Sample], steps: int) -> dict[str, Trend]:
    """By series, of those with enough samples that count."""
    found = {}
    counted = tail(samples, steps)
    for name in sorted({name for sample in counted for name in sample.values}):
        points = [(s.step, s.values[name]) for s in counted if name in s.values]
        if len(points) < FEWEST:
            continue
        values = [value for _, value in points]
        steps_of = [step for step, _ in points]
        tenth, half = max(1, len(values) // 10), len(values) // 2
        found[name] = Trend(
            slope=1000 * theil_sen(steps_of, values),
            late=1000 * theil_sen(steps_of[half:], values[half:]),
            first=float(np.median(values[:tenth])),
            last=float(np.median(values[-tenth:])),
            peak=max(s.values[name] for s in samples if name in s.values),
            samples=len(points),
        )
    return found


def violations(
    samples: Sequence[Sample],
    steps: int,
    bounds: Mapping[str, float],
    lasting: Sequence[str] = (),
) -> list[str]:
    """Series that grow by more than the bound of their kind, and what was not measured to the end.

    `bounds`: the largest slope per 1,000 steps by the part of a series' name before the last slash.
    A series whose name begins with one of `lasting` must be in every sample that counts.
    """
    counted, found = tail(samples, steps), []
    if len(counted) < FEWEST:
        return [f"only {len(counted)} samples of the last two thirds of {steps} steps"]
    for name, trend in trends(samples, steps).items():
        kind = name.rpartition("/")[0]
        if kind not in bounds:
            found.append(f"{name}: no bound is stated for {kind}")
        elif not trend.slope <= bounds[kind]:
            found.append(
                f"{name}: grows by {trend.slope:.3g} in 1,000 steps, from {trend.first:.4g} to "
                f"{trend.last:.4g}; the bound is {bounds[kind]:g}"
            )
    for name in sorted({name for sample in counted for name in sample.values}):
        missing = sum(name not in sample.values for sample in counted)
        if missing and name.startswith(tuple(lasting)):
            found.append(f"{name}: came or went; it is not in {missing} of {len(counted)} samples")
    return found
