"""Curves of a report: the large one, what bounded the runs, and all else that is recorded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from rlhf_cluster.observe.report.charts import Curve, chart
from rlhf_cluster.observe.report.html_text import text
from rlhf_cluster.observe.report.learning_curve import moving_average
from rlhf_cluster.observe.report.read_run import RunRecord

MAX_PARTS = 8  # colours

MIN_SMOOTHED = 4  # steps of a run whose curve is smoothed

GAIN = "advisor/gain/"

CHARTS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("Staleness [steps]", (("staleness/max", "largest"), ("staleness/mean", "mean"))),
    ("Response [tokens]", (("response/length_mean_tokens", "mean length"),)),
    ("Policy [nats]", (("learner/entropy", "entropy"), ("learner/kl_ref", "KL to the reference"))),
    ("Gradient norm", (("learner/grad_norm", "before clipping"),)),
    (
        "Tokens clipped and corrected [share]",
        (
            ("learner/clip_fraction", "ratio clipped"),
            ("importance/capped_fraction", "weight capped"),
            ("importance/masked_fraction", "masked"),
        ),
    ),
    (
        "Effective sample size [share]",
        (("importance/effective_sample_size", "of the step's tokens"),),
    ),
    ("Step time [s]", (("time/step_s", "whole step"), ("time/train_s", "training"))),
    (
        "Tokens a second",
        (
            ("step/tokens_per_s", "response tokens"),
            ("stage/tokens_per_s", "tokens read"),
            ("generate/tokens_per_s", "tokens of responses"),
        ),
    ),
    ("Groups in the buffer", (("buffer/in_flight", "in flight"), ("buffer/ready", "ready"))),
)

WAITS = (
    ("time/learner_wait_s", "learner waits"),
    ("time/generation_wait_s", "generation waits"),
    ("time/train_s", "training"),
)


def main_chart(runs: Sequence[RunRecord], large: bool) -> str:
    """Return the main chart: the headline metric of the steps, smoothed, with held-out points.

    `large` is for wide screens, on which it fills the width.
    """
    several, curves = len(runs) > 1, []
    for i, run in enumerate(runs):
        points = run.points(run.headline)
        own = f"{run.name}: " if several else ""
        window = max(2, min(20, len(points) // 8))
        if len(points) >= MIN_SMOOTHED:
            means = moving_average(np.array([y for _, y in points]), window).tolist()
            smooth = [(x, y) for (x, _), y in zip(points, means, strict=True)]
            curves.append(Curve(label=f"{own}mean of {window} steps", points=smooth, colour=i))
        curves.append(Curve(label=f"{own}mean of the step", points=points, colour=i, style=4))
        for k, (label, found) in enumerate(run.held_out.items(), start=1):
            colour = i if several else k
            curves.append(Curve(label=own + label, points=found, colour=colour, style=3))
    titles = sorted({"Reward" if not run.watched else run.headline for run in runs})
    if not any(curve.points for curve in curves):
        return '<p class="none">nothing recorded</p>'
    return chart(" and ".join(titles), curves, large=large)


def bounds(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield what bounded each run, as the advisor says it, and the curves behind that."""
    for run in runs:
        if run.advice is not None:
            own = f"{run.name}: " if len(runs) > 1 else ""
            yield f'<p class="advice">{text(own + run.advice)}</p>'
    note = "Shares of the step's wall time, mean over ten steps."
    charts = [("Who waits for whom", list(_waits(runs)), note), _gains(runs)]
    full = [(title, curves, note) for title, curves, note in charts if _has_points(curves)]
    if full:
        yield '<div class="grid-of">'
        for title, curves, note in full:
            yield chart(title, curves, note=note)
        yield "</div>"


def curves(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the charts of all else that is recorded; nothing where nothing is."""
    found: list[tuple[str, list[Curve], str]] = []
    parts = sorted({name for run in runs for name in run.parts})[:MAX_PARTS]
    labels = [(name, name.removeprefix("reward/part/")) for name in parts]
    note = "Means of the step. What is only watched is among them."
    found.append(("Parts of the reward", list(_of_all(runs, labels)), note))
    found += [(title, list(_of_all(runs, names)), "") for title, names in CHARTS]
    full = [(title, curves, note) for title, curves, note in found if _has_points(curves)]
    if full:
        yield '<div class="grid-of">'
        for title, drawn, note in full:
            yield chart(title, drawn, note=note)
        yield "</div>"


def _has_points(curves: Sequence[Curve]) -> bool:
    return any(math.isfinite(y) for curve in curves for _, y in curve.points)


def _of_all(runs: Sequence[RunRecord], names: Sequence[tuple[str, str]]) -> Iterator[Curve]:
    """Draw one run with a colour per metric, several with a colour per run and a style per metric."""
    for i, run in enumerate(runs):
        for k, (name, label) in enumerate(names):
            several = len(runs) > 1
            yield Curve(
                label=f"{run.name}: {label}" if several else label,
                points=run.points(name),
                colour=i if several else k,
                style=k % 3 if several else 0,
            )


def _gains(runs: Sequence[RunRecord]) -> tuple[str, list[Curve], str]:
    """Draw the predicted speedup from one more worker in any pool."""
    names = sorted({n for run in runs for r in run.records for n in r if n.startswith(GAIN)})
    labels = [(n, n.removeprefix(GAIN)) for n in names[:MAX_PARTS]]
    shown = [(n, f"{own} twice as fast" if own == "learner" else own) for n, own in labels]
    note = "1 is nothing. The largest is the bottleneck."
    return "Gain of one more worker, predicted", list(_of_all(runs, shown)), note


def _waits(runs: Sequence[RunRecord]) -> Iterator[Curve]:
    for i, run in enumerate(runs):
        steps = [r for r in run.steps if (r.get("time/step_s") or 0) > 0]
        for k, (name, label) in enumerate(WAITS):
            several = len(runs) > 1
            if not any(r.get(name) is not None for r in steps):
                continue
            shares = [min(1.0, (r.get(name) or 0.0) / r["time/step_s"]) for r in steps]
            means = moving_average(np.array(shares), 10).tolist()
            yield Curve(
                label=f"{run.name}: {label}" if several else label,
                points=[(float(r["step"]), y) for r, y in zip(steps, means, strict=True)],
                colour=i if several else k,
                style=k if several else 0,
            )
