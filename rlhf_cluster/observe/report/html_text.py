"""Text of a run as HTML: escaped, cut, and without characters that reorder others."""

from __future__ import annotations

import re
from collections.abc import Iterable
from html import escape

MAX_TEXT = 4000  # characters of a prompt or response

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ufffe\uffff]")


def text(value: object) -> str:
    """Return a text that is safe in HTML and attributes, without characters that reorder others."""
    return escape(_CONTROL.sub("\ufffd", str(value)), quote=True)


def cut_text(value: object) -> str:
    """Return the first `MAX_TEXT` characters, and how many more there are."""
    found = str(value)
    more = len(found) - MAX_TEXT
    return text(found[:MAX_TEXT]) + (f" <i>... {more:,} characters more</i>" if more > 0 else "")


def section(title: str, parts: Iterable[str]) -> str:
    """Return a section with a heading; nothing where there are no parts."""
    body = "".join(parts)
    return f"<section><h2>{text(title)}</h2>{body}</section>" if body else ""


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Return a table of names and values; nothing without rows."""
    body = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table class="pairs">{body}</table></div>' if body else ""


def duration(seconds: float) -> str:
    """Return a time as text: 42 s, 2 min 28 s, 3 h 5 min."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes_of_hour = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes_of_hour} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
