"""Page of a report, as HTML with curves as inline SVG.

Pure: reads and writes no file but in `write_page`.

Colours of curves are the page's classes c0 to c7, so that they follow light and dark. Values that are
missing or not finite leave gaps. Long curves are drawn as means over bins, so that a page stays small
however long the run was.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster.observe.record.samples import Row
from rlhf_cluster.observe.report.learning_curve import moving_average
from rlhf_cluster.observe.report.read_run import RunRecord
from rlhf_cluster.run.run_record import who_waits
from rlhf_cluster.util.durable_files import write_all

WIDTH, HEIGHT = 420.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 46.0, 8.0, 8.0, 24.0
MAX_POINTS = 300
NUM_COLOURS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Curve of a chart. `colour` is a number; `style`: 0 a line, 1 dashed, 2 dotted, 3 points."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    style: int = 0


def chart(title: str, curves: Sequence[Curve], x_label: str = "step", note: str = "") -> str:
    """Return a figure with heading and legend, and a note where there is nothing to draw."""
    drawn = [replace(curve, points=_average_bins(_finite(curve.points))) for curve in curves]
    drawn = [curve for curve in drawn if curve.points]
    head = f"<figcaption>{escape(title)}</figcaption>"
    if not drawn:
        return f'<figure>{head}<p class="none">nothing recorded</p></figure>'
    points = [point for curve in drawn for point in curve.points]
    x0, x1 = _pad(min(x for x, _ in points), max(x for x, _ in points), 0.0)
    y0, y1 = _pad(min(y for _, y in points), max(y for _, y in points), 0.06)
    scale = _Scale(x0, x1, y0, y1)
    body = "".join([_grid(scale, x_label), *(_draw(curve, scale) for curve in drawn)])
    legend = "".join(
        f'<li class="c{curve.colour % NUM_COLOURS} s{curve.style}">{escape(curve.label)}</li>'
        for curve in drawn
    )
    small = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f'<figure>{head}<svg viewBox="0 0 {WIDTH:g} {HEIGHT:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{body}</svg>'
        f'<ul class="legend">{legend}</ul>{small}</figure>'
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Return round numbers from `low` to `high`, which must differ."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first
    return [(first + i) * step for i in range(count + 1)]


@dataclass(frozen=True, slots=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def _average_bins(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= MAX_POINTS:
        return points
    size = len(points) / MAX_POINTS
    bins = (points[round(i * size) : round((i + 1) * size)] for i in range(MAX_POINTS))
    return [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins if b]


def _pad(low: float, high: float, share: float) -> tuple[float, float]:
    """Return a range with a margin at both ends, also where all values are equal."""
    if high - low <= 1e-12 * max(abs(low), abs(high), 1e-12):
        margin = 0.5 * abs(low) or 0.5
        return low - margin, high + margin
    margin = share * (high - low)
    return low - margin, high + margin


def _grid(scale: _Scale, x_label: str) -> str:
    parts = []
    for value in ticks(scale.y0, scale.y1):
        y = scale.y(value)
        parts.append(
            f'<path class="grid" d="M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"/>'
            f'<text x="{LEFT - 5:g}" y="{y + 4:.1f}" text-anchor="end">{_short(value)}</text>'
        )
    for value in ticks(scale.x0, scale.x1, about=4):
        x = scale.x(value)
        parts.append(
            f'<text x="{x:.1f}" y="{HEIGHT - 8:g}" text-anchor="middle">{_short(value)}</text>'
        )
    parts.append(
        f'<text x="{LEFT - 14:g}" y="{HEIGHT - 8:g}" text-anchor="end">{escape(x_label)}</text>'
    )
    return "".join(parts)


def _draw(curve: Curve, scale: _Scale) -> str:
    colour = f"c{curve.colour % NUM_COLOURS}"
    places = [(f"{scale.x(x):.1f}", f"{scale.y(y):.1f}") for x, y in curve.points]
    if curve.style == 3 or len(places) == 1:
        dots = "".join(f'<circle cx="{x}" cy="{y}" r="3.5"/>' for x, y in places)
        return f'<g class="dots {colour}">{dots}</g>'
    line = "L".join(f"{x} {y}" for x, y in places)
    return f'<path class="line {colour} s{curve.style}" d="M{line}"/>'


def _short(value: float) -> str:
    if value == 0 or abs(value) < 1e-12:
        return "0"
    for limit, base, mark in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= limit:
            return f"{value / base:g}{mark}"
    return f"{value:.6g}" if abs(value) >= 1e-3 else f"{value:.0e}"


MAX_PARTS = 8  # colours

GAIN = "advisor/gain/"

MAX_TEXT = 4000  # characters of a prompt or response

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")

POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

CHARTS: Sequence[tuple[str, Sequence[tuple[str, str]]]] = (
    ("Reward", (("reward/mean", "mean of the step"), ("evaluation/reward_mean", "held-out"))),
    ("Staleness [steps]", (("staleness/max", "largest"), ("staleness/mean", "mean"))),
    ("Response [tokens]", (("response/length_mean_tokens", "mean length"),)),
    ("Policy [nats]", (("learner/entropy", "entropy"), ("learner/kl_ref", "KL to the reference"))),
    ("Step time [s]", (("time/step_s", "whole step"), ("time/train_s", "training"))),
    ("Tokens a second", (("step/tokens_per_s", "response tokens"),)),
    ("Groups in the buffer", (("buffer/in_flight", "in flight"), ("buffer/ready", "ready"))),
)

WAITS = (
    ("time/learner_wait_s", "learner waits"),
    ("time/generation_wait_s", "generation waits"),
    ("time/train_s", "training"),
)

_POINTS = "evaluation/reward_mean"

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a202c;--dim:#5a6577;--line:#d9dee6;--card:#f6f8fa;
--c0:#2b6cb0;--c1:#c05621;--c2:#2f855a;--c3:#b83280;--c4:#6b46c1;--c5:#975a16;--c6:#00768a;--c7:#c53030}
@media(prefers-color-scheme:dark){:root{--bg:#12161c;--fg:#e6eaf0;--dim:#9aa7b8;--line:#323b47;
--card:#1a2028;--c0:#63b3ed;--c1:#f6ad55;--c2:#68d391;--c3:#f687b3;--c4:#b794f4;--c5:#d6bc6a;
--c6:#4fd1c5;--c7:#fc8181}}
*{box-sizing:border-box}body{margin:0 auto;max-width:84rem;padding:1rem;background:var(--bg);
color:var(--fg);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.15rem;margin:2rem 0 .6rem}
h3{font-size:1rem;margin:1rem 0 .3rem}
.grid-of{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr))}
figure,.card{margin:0;padding:.7rem;background:var(--card);border:1px solid var(--line);
border-radius:.5rem;min-width:0}
figcaption{font-weight:600}svg{width:100%;height:auto;display:block}
svg text{fill:var(--dim);font-size:12px}.grid{stroke:var(--line)}
.line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}
.dots circle{fill:currentColor}.s1{stroke-dasharray:6 4}.s2{stroke-dasharray:2 3}
.c0{color:var(--c0)}.c1{color:var(--c1)}.c2{color:var(--c2)}.c3{color:var(--c3)}
.c4{color:var(--c4)}.c5{color:var(--c5)}.c6{color:var(--c6)}.c7{color:var(--c7)}
.legend{list-style:none;margin:.3rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem .9rem;
font-size:.85rem}.legend li::before{content:"\\2501";margin-right:.35em}
.legend .s1::before{content:"\\2505"}.legend .s2::before{content:"\\2509"}
.legend .s3::before{content:"\\25cf"}
.note,.none,.dim{color:var(--dim);font-size:.85rem;margin:.3rem 0 0}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:.92rem}
th,td{text-align:left;padding:.3rem .6rem;border-bottom:1px solid var(--line);vertical-align:top}
th{overflow-wrap:normal}
pre{white-space:pre-wrap;margin:.3rem 0;padding:.5rem;background:var(--bg);
border:1px solid var(--line);border-radius:.3rem;font-size:.85rem}
details{margin:.4rem 0}summary{cursor:pointer}.bad{color:var(--c7)}
"""


def page(runs: Sequence[RunRecord], now_s: float) -> str:
    """Return the whole document. `now_s` is unix time."""
    title = "Run " + ", ".join(run.name for run in runs)
    made = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{text(title)}</h1><p class="dim">Made {made} from the run directories.</p>',
        *_section("Where they stand" if len(runs) > 1 else "Where it stands", _standing(runs)),
        *_section("Curves", ['<div class="grid-of">', *_curves(runs), "</div>"]),
        *_section("Settings that differ", _differences(runs) if len(runs) > 1 else ()),
        *_section("Samples", (part for run in runs for part in _samples(run, len(runs) > 1))),
        *_section("Events and faults", (part for run in runs for part in _events(run))),
        "</body></html>\n",
    ]
    return "".join(parts)


def write_page(path: Path, content: str) -> None:
    """Replace `path` atomically: a browser that reloads sees the old page or the new one."""
    write_all(path, content.encode(errors="replace"))


def text(value: object) -> str:
    """Return a text that is safe in HTML and attributes, without characters that reorder others."""
    return escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def _section(title: str, parts: Iterator[str] | Sequence[str]) -> list[str]:
    body = "".join(parts)
    return [f"<section><h2>{text(title)}</h2>{body}</section>"] if body else []


def _standing(runs: Sequence[RunRecord]) -> Iterator[str]:
    yield '<div class="grid-of">'
    for run in runs:
        yield '<div class="card">'
        yield f"<h3>{text(run.name)}</h3><table>"
        for name, value in _facts(run):
            yield f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>"
        yield "</table>"
        for problem in run.problems:
            yield f'<p class="bad">{text(problem)}</p>'
        yield "</div>"
    yield "</div>"


def _facts(run: RunRecord) -> Iterator[tuple[str, str]]:
    s, steps = run.snapshot, run.steps
    if s is None:
        yield "state", "starting" if run.active else "ended before it wrote a status"
    else:
        gone = s.is_active and not run.active
        yield "state", f"{s.standing} - its process is gone: crashed" if gone else s.standing
        yield "step", f"{s.step:,} of {s.num_steps:,}"
        yield "time", f"{s.elapsed_s / 60:,.1f} min"
    if s is not None and s.stage is not None:
        yield "stage", s.stage
        value, held_out = (
            ("-" if v is None else f"{v:.4g}") for v in (s.metric_value, s.metric_held_out)
        )
        yield s.metric or "metric", f"{value}, held-out {held_out}"
    elif s is not None:
        waits = who_waits(s.learner_wait_s, s.generation_wait_s, s.step_s)
        yield "waiting, last step", waits
        workers = ", ".join(f"{p.name} {p.alive}/{p.wanted}" for p in s.pools)
        yield "workers", workers or "-"
    if s is None or s.stage is None:
        yield "bottleneck", run.advice or "not enough steps to say"
    if steps:
        tenth = max(1, len(steps) // 10)
        first = sum(r["reward/mean"] for r in steps[:tenth]) / tenth
        last = sum(r["reward/mean"] for r in steps[-tenth:]) / tenth
        yield "reward", f"{first:.3g} -> {last:.3g} (first and last tenth of the steps)"
        largest = [r["staleness/max"] for r in steps if r.get("staleness/max") is not None]
        if largest:
            yield "staleness", f"{max(largest):g} at most"
    held_out = run.evaluations
    if held_out:
        yield "held-out reward", " -> ".join(f"{v:.3g} (step {k})" for k, v in held_out[-4:])
    if s is not None and s.error:
        yield "error", s.error[:MAX_TEXT]
    if run.first_cause:
        yield "first cause", run.first_cause[:MAX_TEXT]


def _curves(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Draw charts of the runs' records, all of them empty where nothing is recorded."""
    found: list[tuple[str, list[Curve], str]] = []
    for name in sorted({name for run in runs for name in run.watched}):
        found.append((name, list(_of_all(runs, ((name, name),))), ""))
    for title, names in CHARTS:
        found.append((title, list(_of_all(runs, names)), ""))
        if title == "Reward":
            parts = sorted({name for run in runs for name in run.parts})[:MAX_PARTS]
            labels = [(name, name.removeprefix("reward/part/")) for name in parts]
            note = "Means of the step. What is only watched is among them."
            if labels:
                found.append(("Parts of the reward", list(_of_all(runs, labels)), note))
        if title.startswith("Staleness"):
            note = "Shares of the step's wall time, mean over ten steps."
            found.append(("Who waits for whom", list(_waits(runs)), note))
            found.append(_gains(runs))
    full = [(title, curves, note) for title, curves, note in found if any(c.points for c in curves)]
    for title, curves, note in full or found:
        yield chart(title, curves, note=note)


def _of_all(runs: Sequence[RunRecord], names: Sequence[tuple[str, str]]) -> Iterator[Curve]:
    """Draw one run with a colour per metric, several with a colour per run and a style per metric."""
    for i, run in enumerate(runs):
        for k, (name, label) in enumerate(names):
            several = len(runs) > 1
            yield Curve(
                label=f"{run.name}: {label}" if several else label,
                points=run.points(name),
                colour=i if several else k,
                style=3 if name == _POINTS else k % 3 if several else 0,
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
            shares = [min(1.0, (r.get(name) or 0.0) / r["time/step_s"]) for r in steps]
            means = moving_average(np.array(shares), 10).tolist()
            yield Curve(
                label=f"{run.name}: {label}" if several else label,
                points=[(float(r["step"]), y) for r, y in zip(steps, means, strict=True)],
                colour=i if several else k,
                style=k if several else 0,
            )


def _differences(runs: Sequence[RunRecord]) -> Iterator[str]:
    flat = [dict(_flat(run.config)) for run in runs]
    names = sorted({name for settings in flat for name in settings} - {"run.name", "run.root"})
    rows = [(name, [settings.get(name, "-") for settings in flat]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    if not rows:
        return
    heads = "".join(f"<th>{text(run.name)}</th>" for run in runs)
    yield f'<div class="wide"><table><tr><th>setting</th>{heads}</tr>'
    for name, values in rows:
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        yield f"<tr><th>{text(name)}</th>{cells}</tr>"
    yield "</table></div>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False, default=str)


def _samples(run: RunRecord, several: bool) -> Iterator[str]:
    if not run.samples:
        return
    if several:
        yield f"<h3>{text(run.name)}</h3>"
    yield '<p class="dim">Of steps from first to last, the best and the worst that were kept.</p>'
    for step, rows in run.samples.items():
        mean = sum(row["reward"] for row in rows) / len(rows) if rows else 0.0
        opened = " open" if step == max(run.samples) else ""
        yield f"<details{opened}><summary>step {step}: {len(rows)} samples, reward {mean:.3g}</summary>"
        yield from map(_sample, rows)
        yield "</details>"


def _sample(row: Row) -> str:
    versions = f"{row['version_min']}..{row['version_max']}"
    about = (
        f"{row['rollout_id']} | reward {row['reward']:.4g} | parts {row['reward_parts']} | "
        f"watched {row.get('watched', '-')} | versions {versions} | staleness {row['staleness']} | "
        f"ended by {row['finish_reason']} | {row['worker']}, {row['scorer']}"
    )
    texts = "".join(f'<pre dir="auto">{_cut(row[name])}</pre>' for name in ("prompt", "response"))
    return f'<div class="card"><div class="dim">{text(about)}</div>{texts}</div>'


def _cut(value: object) -> str:
    found = str(value)
    more = len(found) - MAX_TEXT
    return text(found[:MAX_TEXT]) + (f" <i>... {more:,} characters more</i>" if more > 0 else "")


def _events(run: RunRecord) -> Iterator[str]:
    if not run.events:
        return
    yield f'<h3>{text(run.name)}</h3><div class="wide"><table>'
    for event in reversed(run.events):
        when = text(event.time[:19].replace("T", " "))
        yield f"<tr><th>{when}</th><td>{text(event.text[:MAX_TEXT])}</td></tr>"
    yield "</table></div>"
