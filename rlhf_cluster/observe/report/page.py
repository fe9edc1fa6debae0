"""Page of a report: numbers, curves, what bounded the run, settings, samples, events.

A section for which the run has nothing does not appear. Of the files of a run only the tokenizer is
read here, for the texts of tokens; everything else is in its `RunRecord`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from rlhf_cluster.observe.report.curves_section import bounds, curves, main_chart
from rlhf_cluster.observe.report.html_text import MAX_TEXT, section, text
from rlhf_cluster.observe.report.page_style import POLICY, STYLE
from rlhf_cluster.observe.report.read_run import RunRecord
from rlhf_cluster.observe.report.samples_section import samples
from rlhf_cluster.observe.report.settings_section import differences, settings
from rlhf_cluster.observe.report.summary_section import standing, tiles
from rlhf_cluster.util.durable_files import write_all


def page(runs: Sequence[RunRecord], now_s: float) -> str:
    """Return the whole document. `now_s` is unix time."""
    several = len(runs) > 1
    title = "Run " + ", ".join(run.name for run in runs)
    made = datetime.fromtimestamp(now_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{text(title)}</h1><p class="dim">Made {made} from the run directories.</p>',
        *tiles(runs),
        f'<div class="large for-wide">{main_chart(runs, large=True)}</div>',
        f'<div class="large for-narrow">{main_chart(runs, large=False)}</div>',
        section("Where they stand" if several else "Where it stands", standing(runs)),
        section("What bounded them" if several else "What bounded it", bounds(runs)),
        section("Settings that differ", differences(runs))
        if several
        else section("Settings", settings(runs[0])),
        section("Samples", (part for run in runs for part in samples(run, several))),
        section("Curves", curves(runs)),
        section("Events and faults", (part for run in runs for part in _events(run))),
        "</body></html>\n",
    ]
    return "".join(parts)


def write_page(path: Path, content: str) -> None:
    """Replace `path` atomically: a browser that reloads sees the old page or the new one."""
    write_all(path, content.encode(errors="replace"))


def _events(run: RunRecord) -> Iterator[str]:
    if not run.events:
        return
    yield f'<h3>{text(run.name)}</h3><div class="wide"><table class="pairs">'
    for event in reversed(run.events):
        when = text(event.time[:19].replace("T", " "))
        yield f"<tr><th>{when}</th><td>{text(event.text[:MAX_TEXT])}</td></tr>"
    yield "</table></div>"
