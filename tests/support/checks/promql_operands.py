"""What an alert's expression compares: an alert that does not fire has an empty answer, whether its
metrics are there or not, and only its operands tell the one from the other."""

from __future__ import annotations

import re

SPLITS = re.compile(
    r"\s(?:==|!=|>=|<=|>|<|and|or|unless)\s(?:(?:on|ignoring) \([^)]*\)\s)?(?:group_left \(\)\s)?"
)
OFFSET = re.compile(r" offset \w+")


def operands(expr: str) -> list[str]:
    """The parts between comparisons and `and`, `or`, `unless` outside aggregations and functions, in
    order, plain numbers left out; as of now: without `offset`, which a young run has no answer to."""
    expr = _bare(expr.strip())
    parts, start = [], 0
    for split in SPLITS.finditer(expr):
        if split.start() >= start and _depth(expr[: split.start()]) == 0:
            parts.append(expr[start : split.start()])
            start = split.end()
    if parts:
        return [found for part in (*parts, expr[start:]) for found in operands(part)]
    return [OFFSET.sub("", expr)] if re.search(r"[a-z]", expr) else []


def _bare(expr: str) -> str:
    """Without brackets around the whole."""
    while expr.startswith("(") and all(_depth(expr[:n]) > 0 for n in range(1, len(expr))):
        expr = expr[1:-1].strip()
    return expr


def _depth(text: str) -> int:
    return text.count("(") - text.count(")")
