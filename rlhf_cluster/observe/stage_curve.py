"""The learning curve of an offline stage as a picture, drawn from its record alone."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from rlhf_cluster.observe.curve import BLUE, GREEN, GREY, ORANGE, Records, moving_average, series


def held_out_name(metric: str) -> str:
    """Under which name the record has the held-out value of a metric."""
    return f"stage/held_out/{metric.replace('/', '.')}"


def draw_stage_curve(records: Records, path: str | Path, title: str, headline: str) -> None:
    """Write a PNG: the metric `headline` of steps and of held-out units, gradient norm, speed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, left, right = figure.subplot_mosaic([["top", "top"], ["left", "right"]]).values()
    steps, values = series(records, headline)
    known = np.isfinite(values)
    top.plot(steps[known], values[known], color=GREY, lw=1, label="of the step")
    average = moving_average(values[known], 10)
    top.plot(steps[known], average, color=BLUE, lw=2, label="mean of 10 steps")
    at, held_out = series(records, held_out_name(headline))
    points = np.isfinite(held_out)
    top.plot(at[points], held_out[points], color=ORANGE, marker="D", ms=5, lw=1, label="held out")
    top.set_ylabel(headline)
    top.legend(loc="best", frameon=False)
    for axes, name, color in (
        (left, "learner/grad_norm", BLUE),
        (right, "stage/tokens_per_s", GREEN),
    ):
        axes.plot(*series(records, name), color=color, lw=1.4)
        axes.set_ylabel(name)
        axes.set_ylim(bottom=0)
    for axes in (top, left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=14, fontweight="bold")
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
