"""Top of a report: the four main numbers of each run, and a card of facts about it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rlhf_cluster.observe.report.html_text import MAX_TEXT, duration, table, text
from rlhf_cluster.observe.report.read_run import RunRecord
from rlhf_cluster.run.run_record import who_waits

SPEEDS = ("step/tokens_per_s", "stage/tokens_per_s", "generate/tokens_per_s")


def tiles(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the four numbers of each run, as far as they are known."""
    for run in runs:
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        found = list(_numbers(run))
        if found:
            yield '<div class="tiles">'
            for i, (name, value, more) in enumerate(found):
                lead = " lead" if i == 0 else ""
                yield f'<div class="tile{lead}"><span class="name">{text(name)}</span>'
                yield f'<span class="value">{text(value)}</span>'
                yield f'<span class="more">{text(more)}</span></div>'
            yield "</div>"


def _numbers(run: RunRecord) -> Iterator[tuple[str, str, str]]:
    """Yield name, value and a remark of each number, the most important first."""
    s, points = run.snapshot, run.points(run.headline)
    noun = run.headline if run.watched else "reward"
    for label, found in list(run.held_out.items())[:1]:
        (first, before), (last, after) = found[0], found[-1]
        more = f"steps {first:g} and {last:g}" if len(found) > 1 else f"step {last:g}"
        value = f"{before:.3g} \u2192 {after:.3g}" if len(found) > 1 else f"{after:.3g}"
        yield f"{label} {noun}", value, more
    if points:
        last = [y for _, y in points[-10:]]
        steps = f"mean of the last {len(last)} steps" if len(last) > 1 else "of the only step"
        yield f"training {noun}", f"{sum(last) / len(last):.3g}", steps
    if s is None:
        return
    yield "steps", f"{s.step:,} of {s.num_steps:,}", s.standing
    more = f"about {duration(s.left_s)} left" if s.state == "running" and s.left_s else ""
    speeds = [y for name in SPEEDS for _, y in run.points(name)]
    speed = f"{sum(speeds) / len(speeds):,.0f} tokens/s" if speeds else ""
    yield "time", duration(s.elapsed_s), more or speed


def standing(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield a card of facts about each run, with what could not be read."""
    yield '<div class="grid-of">'
    for run in runs:
        yield '<div class="card">'
        if len(runs) > 1:
            yield f"<h3>{text(run.name)}</h3>"
        yield table(_facts(run))
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
    if s is not None and s.stage is not None:
        yield "stage", s.stage
        value, held_out = (
            ("-" if v is None else f"{v:.4g}") for v in (s.metric_value, s.metric_held_out)
        )
        yield s.metric or "metric", f"{value}, held-out {held_out}"
    elif s is not None:
        if s.is_active:
            waits = who_waits(s.learner_wait_s, s.generation_wait_s, s.step_s)
            yield "waiting, last step", waits
        if s.is_active or s.state == "failed":
            workers = ", ".join(f"{p.name} {p.alive}/{p.wanted}" for p in s.pools)
            yield "workers", workers or "-"
    if steps:
        tenth = max(1, len(steps) // 10)
        first = sum(r["reward/mean"] for r in steps[:tenth]) / tenth
        last = sum(r["reward/mean"] for r in steps[-tenth:]) / tenth
        yield "reward", f"{first:.3g} -> {last:.3g} (first and last tenth of the steps)"
        largest = [r["staleness/max"] for r in steps if r.get("staleness/max") is not None]
        if largest:
            yield "staleness", f"{max(largest):g} at most"
    if not run.watched:
        for label, held_out in run.held_out.items():
            yield f"{label} reward", " -> ".join(f"{v:.3g} (step {k:g})" for k, v in held_out[-4:])
    if (run.path / "final").is_dir():
        yield "trained model", str(run.path / "final")
    if s is not None and s.error:
        yield "error", s.error[:MAX_TEXT]
    if run.first_cause:
        yield "first cause", run.first_cause[:MAX_TEXT]
