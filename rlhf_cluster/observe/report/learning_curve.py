"""Learning curves of a run and of an offline stage, each drawn as a picture.

A curve is drawn from the record alone, so a finished, running or copied run can be drawn anywhere.
Missing and null values leave gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.errors import RunError
from rlhf_cluster.observe.metric_table import METRICS, Metric
from rlhf_cluster.util.durable_files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


Records = Sequence[Mapping[str, Any]]

BLUE, ORANGE, GREEN, GREY, RED = "#2b6cb0", "#dd6b20", "#2f855a", "#a0aec0", "#c53030"

MAX_ANNOTATED = 6  # most points of a series that are labelled with their values

WAITS = (
    ("time/learner_wait_s", "learner waits for groups", ORANGE),
    ("time/train_s", "training", BLUE),
    ("time/publish_wait_s", "copy of the weights", GREEN),
)


def draw_curve(records: Records, path: str | Path, title: str) -> None:
    """Write a PNG of `records` (as `read_metrics` gives them) to `path`.

    Raises `RunError` when no record holds a reward.
    """
    if not np.isfinite(series(records, "reward/mean")[1]).any():
        raise RunError("no step with a reward yet: there is no curve to draw")
    figure = _new_figure(height=8.5)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)  # type: ignore[union-attr]
    grid = figure.add_gridspec(3, 2, height_ratios=(2.0, 1.0, 1.0))
    panels: tuple[tuple[Any, Callable[[Axes, Records], None]], ...] = (
        (grid[0, :], _reward),
        (grid[1, 0], _staleness),
        (grid[1, 1], _length),
        (grid[2, 0], _time),
        (grid[2, 1], _entropy),
    )
    shared = None
    for place, panel in panels:
        axes = figure.add_subplot(place, sharex=shared)
        shared = shared or axes
        panel(axes, records)
        _tidy(axes)
    _save(figure, title, Path(path))


def series(records: Records, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one metric, each [n] float64; NaN where a value is missing."""
    steps = np.array([record["step"] for record in records], dtype=np.float64)
    found = [record.get(name) for record in records]
    return steps, np.array([np.nan if v is None else v for v in found], dtype=np.float64)


def held_out_series(
    recorded: Iterable[str], table: Mapping[str, Metric] = METRICS
) -> dict[str, str]:
    """Return the label of every held-out reward among `recorded` metrics, by name.

    They are the mean rewards of whole answers in the table's area "evaluation". A metric with a label
    has one series per label value, and that value is the label of the series.
    """
    found = {}
    for name in sorted(recorded):
        metric = table.get(name) or table.get(name.rpartition("/")[0])
        if metric is not None and _is_held_out(metric):
            found[name] = name.removeprefix(metric.name).strip("/") or "held-out"
    return found


def _is_held_out(metric: Metric) -> bool:
    area, _, quantity = metric.name.partition("/")
    return area in ("evaluation", "eval") and quantity.endswith("reward_mean")


def moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Return the mean of the last `window` values up to each, ignoring NaN. [n] -> [n]."""
    known = np.isfinite(values)
    sums = np.cumsum(np.where(known, values, 0.0))
    counts = np.cumsum(known).astype(np.float64)
    sums[window:] -= sums[:-window].copy()
    counts[window:] -= counts[:-window].copy()
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _reward(axes: Axes, records: Records) -> None:
    steps, reward = series(records, "reward/mean")
    known = np.isfinite(reward)
    steps, reward = steps[known], reward[known]
    window = max(2, min(20, len(reward) // 8))
    axes.plot(steps, reward, color=GREY, lw=1, marker="." if len(steps) < 60 else "", ms=4)
    axes.lines[-1].set_label("mean of the step")
    axes.plot(steps, moving_average(reward, window), color=BLUE, lw=2.4)
    axes.lines[-1].set_label(f"mean of {window} steps")
    held_out = held_out_series({name for record in records for name in record})
    for (name, label), color in zip(held_out.items(), cycle((RED, ORANGE, GREEN)), strict=False):
        at, evaluation = series(records, name)
        points = np.isfinite(evaluation)
        if not points.any():
            continue
        axes.plot(at[points], evaluation[points], ls="", color=color, marker="D", ms=8, zorder=5)
        axes.lines[-1].set_label("held-out prompts, greedy" if label == "held-out" else label)
        if points.sum() > MAX_ANNOTATED:
            continue
        for x, y in zip(at[points], evaluation[points], strict=True):
            axes.annotate(
                f"{y:.3g}",
                (x, y),
                textcoords="offset points",
                xytext=(8, 8) if x < steps[-1] else (-8, 8),
                ha="left" if x < steps[-1] else "right",
                color=color,
                fontweight="bold",
            )
    axes.set_ylabel("reward")
    axes.margins(y=0.12)
    axes.legend(loc="best", frameon=False)


def _staleness(axes: Axes, records: Records) -> None:
    steps, largest = series(records, "staleness/max")
    _, mean = series(records, "staleness/mean")
    axes.plot(steps, largest, color=ORANGE, lw=1.4, label="largest", drawstyle="steps-mid")
    axes.plot(steps, mean, color=BLUE, lw=1.8, label="mean")
    axes.set_ylabel("staleness [steps]")
    axes.set_ylim(bottom=-0.08, top=max(1.25, 1.25 * float(np.nanmax([0, *largest]))))
    axes.legend(loc="best", frameon=False, ncols=2)


def _length(axes: Axes, records: Records) -> None:
    steps, length = series(records, "response/length_mean_tokens")
    axes.plot(steps, length, color=BLUE, lw=1.8, label="mean length")
    axes.set_ylabel("response [tokens]")
    axes.set_ylim(bottom=0, top=1.25 * max(1.0, float(np.nanmax([0, *length]))))
    _, stopped = series(records, "response/stopped_fraction")
    if np.isfinite(stopped).any():
        right = axes.twinx()
        right.plot(steps, 100 * stopped, color=GREEN, lw=1.4)
        right.set_ylim(0, 125)
        right.set_yticks([0, 50, 100])
        right.set_ylabel("ended itself [%]", color=GREEN)
        right.spines[["top"]].set_visible(False)


def _time(axes: Axes, records: Records) -> None:
    steps, total = series(records, "time/step_s")
    parts = [(np.nan_to_num(series(records, n)[1]), label, c) for n, label, c in WAITS]
    axes.stackplot(
        steps,
        *[values for values, _, _ in parts],
        labels=[label for _, label, _ in parts],
        colors=[color for _, _, color in parts],
        alpha=0.75,
        lw=0,
    )
    axes.plot(steps, total, color="#2d3748", lw=1.2, label="whole step")
    known = total[np.isfinite(total)]
    axes.set_ylim(0, 1.8 * float(np.percentile(known, 98)) if len(known) else 1.0)
    axes.set_ylabel("step time [s]")
    axes.legend(loc="upper left", frameon=False, fontsize=8, ncols=2)


def _entropy(axes: Axes, records: Records) -> None:
    steps, entropy = series(records, "learner/entropy")
    axes.plot(steps, entropy, color=BLUE, lw=1.8, label="entropy")
    _, kl = series(records, "learner/kl_ref")
    if np.isfinite(kl).any():
        axes.plot(steps, kl, color=ORANGE, lw=1.8, label="KL to the reference")
    axes.set_ylabel("policy [nats]")
    axes.set_ylim(bottom=min(0.0, float(np.nanmin([0, *entropy, *kl]))))
    axes.margins(y=0.25)
    axes.legend(loc="best", frameon=False, ncols=2)


def _tidy(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _new_figure(height: float) -> Figure:
    """Return a figure of 10 by `height` inches, which `savefig` draws without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(10, height), dpi=120, layout="constrained")


def _save(figure: Figure, title: str, path: Path) -> None:
    """Write the figure as a PNG, atomically."""
    figure.suptitle(title, fontsize=14, fontweight="bold")
    with write_atomically(path) as file:
        figure.savefig(file, format="png")


def held_out_name(metric: str) -> str:
    """Return the name under which the record has the held-out value of a metric."""
    return f"stage/held_out/{metric.replace('/', '.')}"


def draw_stage_curve(records: Records, path: str | Path, title: str, headline: str) -> None:
    """Write a PNG: the metric `headline` of steps and of held-out units, gradient norm, speed."""
    figure = _new_figure(height=6.5)
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
        _tidy(axes)
    _save(figure, title, Path(path))
