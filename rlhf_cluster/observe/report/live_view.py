"""Live view of a run: a panel on a terminal, one plain line per interval elsewhere.

`render` and `line` are pure; only `LiveView` writes.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

from rlhf_cluster.run.run_record import Snapshot, who_waits

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

NUM_EVENTS = 5
LINE_EVERY_S = 10.0
"""Least time between two lines of steps off a terminal, by the time of their snapshots."""
_STATE_STYLE = {"running": "green", "finished": "bold green", "failed": "bold red"}


def line(snapshot: Snapshot) -> str:
    """Return one step, or the state between steps, as a line of plain text."""
    s = snapshot
    if s.state == "warmup":
        return f"warmup | {s.num_steps:,} supervised steps"
    parts = [f"step {s.step}/{s.num_steps}"]
    if s.state == "running":
        parts += _numbers(s)
    else:
        parts.insert(0, s.standing)
    if s.error:
        parts.append(f"error: {s.error.splitlines()[0]}")
    return " | ".join(parts)


def _numbers(s: Snapshot) -> list[str]:
    """Return the numbers of a step for a line: result, speed, time left."""
    parts = []
    if s.reward is not None:
        mean = "" if s.reward_mean10 is None else f" (mean10 {_number(s.reward_mean10)})"
        parts.append(f"reward {_number(s.reward)}{mean}")
    if s.reward_held_out is not None:
        parts.append(f"held-out {_number(s.reward_held_out)}")
    if s.metric_value is not None:
        parts.append(_headline(s))
    if s.tokens_per_s is not None:
        parts.append(f"{_number(s.tokens_per_s, 0)} tokens/s")
    if s.left_s is not None and s.step < s.num_steps:
        parts.append(f"{_duration(s.left_s)} left")
    return parts


def render(snapshot: Snapshot) -> RenderableType:
    """Return the view as a rich renderable."""
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    s = snapshot
    style = _STATE_STYLE.get(s.state, "yellow")
    blocks: list[RenderableType] = [_progress(s), _facts(s)]
    if s.events:
        blocks.append(Text("\nlast events", style="bold"))
        blocks += [_event(e.time_s, e.text) for e in s.events[-NUM_EVENTS:]]
    if s.error:
        blocks.append(Text(f"\n{s.error}", style="red"))
    title = Text.assemble((s.run, "bold"), "  ", (s.standing, style))
    return Panel(Group(*blocks), title=title, title_align="left", border_style=style)


class LiveView:
    """View of a run that shows snapshots as they come. Use as a context manager.

    With `live` and a terminal the view is redrawn in place. Otherwise a line is printed for each change
    of state, for the first and the last step, and for the steps between at most every `LINE_EVERY_S`.
    """

    def __init__(self, console: Console, live: bool) -> None:
        self._console = console
        self._wanted = live and console.is_terminal
        self._live: Live | None = None
        self._last: Snapshot | None = None  # of the last snapshot
        self._told: Snapshot | None = None  # of the last line about a step

    def __enter__(self) -> LiveView:
        if self._wanted:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def update(self, snapshot: Snapshot) -> None:
        if self._live is not None:
            self._live.update(render(snapshot))
            return
        if self._is_due(snapshot):
            self._console.print(line(snapshot), markup=False, highlight=False, soft_wrap=True)
        self._last = snapshot

    def _is_due(self, s: Snapshot) -> bool:
        """Return whether a line of `s` is due: it has something new, and the last one is not recent."""
        if s.state != "running":
            return self._last is None or self._last.state != s.state
        told = self._told
        if told is not None:
            early = s.time_s - told.time_s < LINE_EVERY_S and s.step < s.num_steps
            if s.step == told.step or (early and s.step > told.step):
                return False
        self._told = s
        return True

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _progress(s: Snapshot) -> RenderableType:
    from rich.progress_bar import ProgressBar
    from rich.table import Table

    row = Table.grid(padding=(0, 1), expand=True)
    row.add_column(no_wrap=True)
    row.add_column(ratio=1)
    row.add_column(no_wrap=True)
    left = s.left_s if s.state == "running" else None
    remaining = f", about {_duration(left)} left" if left is not None else ""
    row.add_row(
        f"step {s.step} of {s.num_steps}",
        ProgressBar(total=max(1, s.num_steps), completed=s.step),
        f"{_duration(s.elapsed_s)}{remaining}",
    )
    return row


def _facts(s: Snapshot) -> RenderableType:
    from rich.table import Table

    table = Table.grid(padding=(0, 3))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    if s.stage is not None:
        table.add_row(s.stage, _headline(s))
        speed = f"{_number(s.tokens_per_s, 0)} tokens/s, {_number(s.step_s, 2)} s a step"
        table.add_row("speed", speed)
        return table
    table.add_row("reward", f"{_number(s.reward)} now, {_number(s.reward_mean10)} mean of 10 steps")
    if s.reward_held_out is not None:
        table.add_row("held-out", f"{_number(s.reward_held_out)} reward")
    table.add_row(
        "staleness", f"{_number(s.staleness_mean, 2)} mean, {_number(s.staleness_max, 0)} largest"
    )
    table.add_row(
        "speed",
        f"{_number(s.tokens_per_s, 0)} tokens/s, {_number(s.step_s, 2)} s a step, "
        f"{_number(s.response_length_tokens, 1)} tokens a response",
    )
    table.add_row("waiting", who_waits(s.learner_wait_s, s.generation_wait_s, s.step_s))
    if s.advice is not None:
        table.add_row("bottleneck", s.advice)
    table.add_row("workers", _pools(s))
    table.add_row(
        "buffer",
        f"{s.buffer_in_flight} in flight, {s.buffer_ready} ready, {s.buffer_discarded} discarded",
    )
    table.add_row(
        "weights", f"{_version(s.version_published)} published, {_version(s.version_live)} live"
    )
    return table


def _headline(s: Snapshot) -> str:
    held_out = "" if s.metric_held_out is None else f" (held out {_number(s.metric_held_out, 4)})"
    return f"{s.metric or 'metric'} {_number(s.metric_value, 4)}{held_out}"


def _pools(s: Snapshot) -> RenderableType:
    from rich.text import Text

    text = Text("" if s.pools else "-")
    for i, pool in enumerate(s.pools):
        restarts = f" ({pool.restarts} restarts)" if pool.restarts else ""
        text.append("   " if i else "")
        text.append(
            f"{pool.name} {pool.alive}/{pool.wanted}{restarts}",
            style="" if pool.alive >= pool.wanted else "bold red",
        )
    return text


def _event(time_s: float, text: str) -> RenderableType:
    from rich.text import Text

    clock = time.strftime("%H:%M:%S", time.localtime(time_s))
    return Text.assemble((f"{clock}  ", "dim"), text, overflow="ellipsis", no_wrap=True)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _version(value: int | None) -> str:
    return "-" if value is None or value < 0 else f"v{value}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
