"""Compares two mathematical answers with math-verify, in the child process of `maths.py`."""

from __future__ import annotations

import functools
import logging
import re
import resource
from typing import Any

from math_verify import parse, verify

from rlhf_cluster.rewards.maths import final_answer

_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_TEXT = re.compile(r"\\(?:text|mathrm|mbox|begin|end)\s?\{[^{}]*\}")
_MIXED = re.compile(r"(?<![\w.])(\d{1,15})\s+(\d{1,15})/(\d{1,15})(?![\w.])")
_POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?!\w)")

MEMORY_BYTES = 2 << 30
"""Address space of the child: a comparison that would take more fails."""


def compare(expected: str, completion: str | None) -> bool:
    """Whether the completion's answer equals the expected one; None: whether that can be read."""
    _prepare()
    wanted = _read(expected, is_expected=True)
    if completion is None:
        return bool(wanted)
    found = _read(completion, is_expected=False)
    # The library's own time-outs are signals, which a loop in C code defeats: the parent kills.
    return bool(wanted and found and verify(wanted, found, timeout_seconds=None))


@functools.cache
def _prepare() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))


@functools.lru_cache(maxsize=256)
def _read(text: str, is_expected: bool) -> list[Any]:
    """Sympy expressions, or nothing. Texts that are no mathematics are none."""
    answer = final_answer(text)
    if answer is None:
        return _parse(text) if not is_expected or _has_words(text) else _parse_formula(text)
    if _has_words(answer):  # "about 72 eggs": taken for a formula, each letter would be a factor
        return _parse(answer) or _parse_formula(answer)
    return _parse_formula(answer) or _parse(answer)


def _has_words(text: str) -> bool:
    return _WORD.search(_TEXT.sub("", text)) is not None


def _parse_formula(text: str) -> list[Any]:
    return _parse(f"${_plain(text)}$")


def _plain(answer: str) -> str:
    """What the library does not read by itself, in LaTeX."""
    answer = answer.replace("\\$", "").strip().strip("$").strip()
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    return _POWER.sub(r"\1\\cdot 10^{\2}", answer)


def _parse(text: str) -> list[Any]:
    # Silences a type that the library gives too narrowly: None turns its signals off.
    options: dict[str, Any] = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
    return parse(text, **options)


# The library warns once that its own time-outs are off, which is on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)
# The library's first formula may take seconds on a busy machine: that is part of the child's start.
_parse("$\\frac{1}{2}$")
