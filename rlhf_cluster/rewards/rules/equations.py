"""Scores each reasoning step by its equations: `right`, `wrong`, or 0.0 for a step without any.

An equation is `a = b` where both sides are arithmetic (numbers, + - * / x ^, parentheses) and one of
them has an operator: `x = 5` and `5 = 5` are none, `2 + 3 = 5 = 10 / 2` is two. A side ends where
words begin, so `that makes 2 * 4 = 8 eggs` counts. A step is right when all of its equations are.
Arithmetic is exact; a side with decimals may be rounded to them (`10 / 3 = 3.33`).

Numbers may have thousands commas and a currency sign. Percent signs and units before `=` are words:
such equations are not seen. Reading takes time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Literal

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext, RewardSection

MAX_TOKENS = 40
"""Numbers, operators and parentheses of one side; longer sides are not read."""
MAX_POWER_BITS = 4096
"""Largest power that is read: working one out could take all memory."""

_TOKEN = re.compile(
    r" ?(?:[$\u20ac\u00a3] ?)?(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d{1,30}(?!\d))(?:\.\d{1,30})?)"
    r"(?![\w%])| ?(?P<symbol>[-+*/^()\u00d7\u00f7\u2212]|x(?!\w))",
    re.ASCII,
)
_OTHER = re.compile(r" ?(?:\w+|.)", re.DOTALL)
_BULLET = re.compile(r"[-+*] ")
_OPERATORS = "+-*/^"
_SYMBOLS = {"x": "*", "\u00d7": "*", "\u00f7": "/", "\u2212": "-"}


class EquationsConfig(RewardSection):
    """Every step's equations are right."""

    type: Literal["equations"] = "equations"
    right: float = 1.0
    """Score of a step all of whose equations are right."""
    wrong: float = -1.0
    """Score of a step with an equation that is wrong."""

    @property
    def scores_steps(self) -> bool:
        return True


class Equations:
    def __init__(self, config: EquationsConfig, context: RewardContext) -> None:
        self._config = config

    def score_steps(
        self,
        prompt: Prompt,
        rollouts: Sequence[Rollout],
        completions: Sequence[str],
        steps: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Return one score per step of each rollout."""
        return [[self._score(step) for step in own] for own in steps]

    def close(self) -> None:
        """Nothing to release."""

    def _score(self, step: str) -> float:
        found = equations(step)
        if not found:
            return 0.0
        return self._config.right if all(found) else self._config.wrong


def equations(step: str) -> list[bool]:
    """Whether each equation of the text is right, in order."""
    text = " ".join(step.split())
    bullet = _BULLET.match(text)
    found = []
    for left, right in pairwise(text[bullet.end() if bullet else 0 :].split("=")):
        one, other = _last(left), _first(right)
        if one is not None and other is not None and (one.operators or other.operators):
            found.append(_equal(one, other))
    return found


class _Side:
    """Arithmetic that was read: its value, its operators, and the decimals that it shows."""

    def __init__(self, tokens: Sequence[str]) -> None:
        """Read an expression. Raises `ValueError` where the tokens are none, `ZeroDivisionError`."""
        self._tokens, self._next = list(tokens), 0
        self.operators = sum(t in _OPERATORS for t in tokens)
        numbers = [t for t in tokens if t[0].isdigit()]
        self.decimals = max((len(n.partition(".")[2]) for n in numbers), default=0)
        self.value = self._sum()
        if self._next < len(self._tokens):
            raise ValueError(f"{self._tokens[self._next]!r} follows an expression")

    def _take(self, among: str) -> str | None:
        if self._next < len(self._tokens) and self._tokens[self._next] in among:
            self._next += 1
            return self._tokens[self._next - 1]
        return None

    def _sum(self) -> Fraction:
        value = self._product()
        while (sign := self._take("+-")) is not None:
            value += self._product() if sign == "+" else -self._product()
        return value

    def _product(self) -> Fraction:
        value = self._factor()
        while (sign := self._take("*/")) is not None:
            value = value * self._factor() if sign == "*" else value / self._factor()
        return value

    def _factor(self) -> Fraction:
        if self._take("-"):
            return -self._factor()
        value = self._operand()
        return _power(value, self._factor()) if self._take("^") else value

    def _operand(self) -> Fraction:
        if self._take("("):
            value = self._sum()
            if not self._take(")"):
                raise ValueError("a parenthesis is open")
            return value
        if self._next == len(self._tokens) or not self._tokens[self._next][0].isdigit():
            raise ValueError("a number is missing")
        self._next += 1
        return Fraction(self._tokens[self._next - 1])


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """Raise to a power. Raises `ValueError`: irrational or too many digits; `ZeroDivisionError`."""
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if exponent.denominator != 1 or bits * abs(exponent) > MAX_POWER_BITS:
        raise ValueError(f"{base} ^ {exponent} is not arithmetic")
    return base ** int(exponent)


def _equal(one: _Side, other: _Side) -> bool:
    shown = other if one.operators else one
    rounded = shown.decimals > 0 and not shown.operators
    return abs(one.value - other.value) <= (Fraction(1, 2 * 10**shown.decimals) if rounded else 0)


def _last(text: str) -> _Side | None:
    """The longest expression at the end; none where it is only the end of something unread."""
    run = _runs(text)[-1]
    for begin in range(len(run)):
        side = _read(run[begin:])
        if side is not None:
            return None if begin and run[begin - 1] in f"{_OPERATORS}(" else side
    return None


def _first(text: str) -> _Side | None:
    """The longest expression at the beginning; none where something unread continues it."""
    run = _runs(text)[0]
    for end in range(len(run), 0, -1):
        side = _read(run[:end])
        if side is not None:
            return None if end < len(run) and run[end] in _OPERATORS else side
    return None


def _read(tokens: Sequence[str]) -> _Side | None:
    try:
        return _Side(tokens)
    except (ValueError, ZeroDivisionError):
        return None


def _runs(text: str) -> list[list[str]]:
    """Numbers and symbols that follow each other, cut where other text is between them."""
    runs: list[list[str]] = [[]]
    text, position = text.rstrip(), 0
    while position < len(text):
        token = _TOKEN.match(text, position)
        if token is None:
            token = _OTHER.match(text, position)
            runs.append([])
        elif token["number"]:
            runs[-1].append(token["number"].replace(",", ""))
        else:
            runs[-1].append(_SYMBOLS.get(token["symbol"], token["symbol"]))
        position = token.end() if token is not None else len(text)
    return [_readable(run, number) for number, run in enumerate(runs)]


def _readable(run: list[str], number: int) -> list[str]:
    """The run, or nothing: after a word, `- 3 + 4` continues what the word means."""
    after_word = number > 0 and bool(run) and run[0] in _OPERATORS
    return [] if after_word or len(run) > MAX_TOKENS else run
