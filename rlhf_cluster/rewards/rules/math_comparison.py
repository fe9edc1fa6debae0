"""Compares two mathematical answers, in the child process of `math_answer.py`; math-verify
compares all but numbers. Its advice for rewards is followed: malformed operators of a completion
(`x^(10)`) are not repaired, and equations are not read as values."""

from __future__ import annotations

import functools
import logging
import re
import resource
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rlhf_cluster.rewards.rules.final_answer import (
    FORMULA,
    JOINT,
    MAX_STATEMENT_CHARACTERS,
    Statement,
    final_statement,
    target_statement,
)
from rlhf_cluster.rewards.rules.math_answer import has_words
from rlhf_cluster.rewards.rules.math_spelling import (
    alike,
    in_latex,
    operations,
    spare_operations,
)
from rlhf_cluster.rewards.rules.plain_text import WRAPPED
from rlhf_cluster.rewards.rules.quantities import Quantity, read_statement, read_target
from rlhf_cluster.rewards.rules.withheld import is_withheld

_PLACES = 6
_BEGIN = re.compile(r"[\\\d(\[{^]|(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_RANGE = re.compile(r"\s*(?:to|through|versus|\u2013|-)\s*")
_MIXED = re.compile(r"(?<![\w.])(\d{1,15})\s+(\d{1,15})/(\d{1,15})(?![\w.])")
_POWER = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([-+]?\d{1,3})(?!\w)")
_PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
_UNIT = re.compile(
    r"(?<=[\w})])\\?\s*\\(?:text|mathrm|mbox)\s?\{\s*[A-Za-z][A-Za-z /]{0,30}\}"
    r"(?:\s?\^\s?\{?[23]\}?)?\s*$"
)
_ROOT = re.compile(r"\\sqrt\s?(\d)")
_SHORT_FRACTION = re.compile(
    r"\\([dtc]?frac|[dt]?binom)(?:\s?(\{(?:[^{}]|\{[^{}]*\})*\}|\d)|\s([A-Za-z]))"
    r"\s?(\{(?:[^{}]|\{[^{}]*\})*\}|[\dA-Za-z])"
)
_EQUALS = re.compile(r"(?<![\\<>!=:])=(?!=)")
_WORDS = re.compile(r"\s*\$?\s*\\text[a-z]*\s?\{([A-Za-z][A-Za-z ',-]+)\}\s*\$?\s*")
"""Target that is words and no formula."""
_COMMAND = re.compile(r"\\[A-Za-z]+")
_LETTER = re.compile(r"[A-Za-z]")
_GREEK = re.compile(
    r"\s*\\(?:var)?(?:alpha|beta|gamma|delta|epsilon|theta|lambda|mu|phi|psi|rho|sigma|omega)\s*"
)
_TUPLE = re.compile(r"\s*(?:\\left)?\(.*,.*\)\s*", re.DOTALL)
_SET = re.compile(r"\s*(?:\\left)?\\(?:\{|lbrace).*(?:\}|rbrace)\s*", re.DOTALL)
_TO_WORK_OUT = (
    r"\gcd", r"\lcm", "gcd", "lcm", r"\binom", r"\choose", "!", r"\sum", r"\prod", r"\int", r"\lim",
    r"\log", r"\ln", r"\sin", r"\cos", r"\tan", r"\cot", r"\sec", r"\csc", r"\arc", r"\lfloor",
    r"\lceil", "|", r"\vert", r"\mod", r"\bmod", r"\pmod", r"\det", r"\max", r"\min", r"\frac{d}",
)  # fmt: skip

MEMORY_BYTES = 2 << 30
"""Address space of the child: a comparison that would take more fails."""


def compare(expected: str, completion: str | None, simplified: bool = True) -> bool:
    """Whether the completion's answer equals the expected one; None: whether that can be read."""
    _prepare()
    number, formulas = _target(expected)
    if completion is None:
        return number is not None or bool(formulas)
    if completion == expected:  # asked where the machine may be at fault
        return _verify(formulas, formulas) or number is not None
    statement = final_statement(completion)
    words = _WORDS.fullmatch(_marked_answer(expected))
    if words is not None and statement.kind != "prose":
        given = WRAPPED.sub(r"\1", statement.text)
        return given.strip(" $.*").casefold() == words[1].strip().casefold()
    names = formulas and _EQUALS.search(_marked_answer(expected)) and _EQUALS.search(statement.text)
    if number is not None and not (names and statement.kind == "box"):  # x = 5 is not y = 5
        found = read_statement(statement)
        if found is not None:
            return _same(number, found)
        if simplified:
            return False
    answer = _formula(statement, may_deny=_is_withheld(_marked_answer(expected)))
    if answer is None or not formulas:
        return False
    return _equal(expected, formulas, answer, simplified)


@functools.cache
def _prepare() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, hard))


def _same(expected: Quantity, found: Quantity) -> bool:
    if expected.unit and found.unit and expected.unit != found.unit:
        return False
    if _close(expected, found, expected.value, found.value):
        return True
    if (expected.unit == "%") == (found.unit == "%"):
        return False
    shares = [q.value / 100 if q.unit == "%" else q.value for q in (expected, found)]
    return _close(expected, found, *shares)


def _close(expected: Quantity, found: Quantity, one: Fraction, other: Fraction) -> bool:
    if expected.is_decimal or found.is_decimal:
        return round(one, _PLACES) == round(other, _PLACES)
    return one == other


@functools.lru_cache(maxsize=256)
def _target(text: str) -> tuple[Quantity | None, list[Any]]:
    answer = _marked_answer(text)
    return read_target(text), _parse(answer, is_target=True) or _words(answer)


def _marked_answer(expected: str) -> str:
    """The answer of a target: what is marked in it, else all of it."""
    marked = target_statement(expected)
    return marked.text if marked is not None else expected


def _formula(statement: Statement, may_deny: bool) -> str | None:
    """The formula of a statement: all of a box, the first one in words, the last one of prose.

    Formulas with nothing but a comma, "and" or "or" between them are one list. `may_deny`: words that
    deny or doubt an answer may be the answer.
    """
    text = statement.text[-2000:] if statement.kind == "prose" else statement.text
    found = list(FORMULA.finditer(text)) if statement.kind != "box" else []
    if not found:
        if statement.kind == "prose":  # a last line that is nothing but a formula
            text = text.rstrip().rpartition("\n")[2]
            text = "" if has_words(text) else text
        if not text or (_is_withheld(text) and not may_deny):
            return None
        return text if statement.kind == "box" else text.strip().rstrip(".").strip("*_` ")
    first = last = len(found) - 1 if statement.kind == "prose" else 0
    while first > 0 and _are_joined(text, *found[first - 1 : first + 1]):
        first -= 1
    while last + 1 < len(found) and _are_joined(text, *found[last : last + 2]):
        last += 1
    chosen, around = found[first : last + 1], found[max(first - 1, 0) : last + 2]
    if not may_deny and any(is_withheld(text, one.start(), one.end()) for one in chosen):
        return None
    if any(_RANGE.fullmatch(text, a.end(), b.start()) for a, b in pairwise(around)):
        return None
    return ", ".join(part for one in chosen for part in one.groups() if part is not None)


def _are_joined(text: str, one: re.Match[str], other: re.Match[str]) -> bool:
    return JOINT.fullmatch(text, one.end(), other.start()) is not None


def _is_withheld(text: str) -> bool:
    """Whether words around a formula deny or doubt it, or make it a bound."""
    words = WRAPPED.sub(r"\1", text[:MAX_STATEMENT_CHARACTERS])
    begin = _BEGIN.search(words)
    return is_withheld(words, begin.start() if begin else 0, len(words))


def _equal(expected: str, wanted: list[Any], answer: str, simplified: bool) -> bool:
    target = _marked_answer(expected)
    aligned, answer = alike(target, answer)
    if aligned != target:
        target, wanted = aligned, _parse(aligned, is_target=True)
    if not _EQUALS.search(target):
        *names, answer = _EQUALS.split(answer)
        for name in names:
            is_name = _GREEK.fullmatch(name) or _LETTER.search(_COMMAND.sub("", name))
            if not is_name and not _verify(wanted, _parse(name)):
                return False
    found = _parse(answer) or _words(answer)
    # A set has no order, so the library holds it equal to a tuple of the same values.
    if (_TUPLE.fullmatch(target) and _SET.fullmatch(answer)) or not _verify(wanted, found):
        return False
    return not simplified or _is_worked_out(answer, found, target, wanted)


def _is_worked_out(answer: str, found: list[Any], target: str, wanted: list[Any]) -> bool:
    """Whether an equal answer has no operation that its target does not have."""
    answer, target = _plain(answer), _plain(target)
    if operations(answer) > operations(target) + spare_operations(target):
        return False
    return _to_work_out(answer, found) <= _to_work_out(target, wanted)


def _verify(wanted: list[Any], found: list[Any]) -> bool:
    # The library's own time-outs are signals, which a loop in C code defeats: the parent kills.
    return bool(wanted and found and verify(wanted, found, timeout_seconds=None))


def _to_work_out(text: str, parsed: list[Any]) -> set[str]:
    """Operations of an answer that a simplified one has only where the expected one has them."""
    kinds = {sign for sign in _TO_WORK_OUT if sign in text}
    nodes = [node for tree in parsed for node in _nodes(tree)]
    for node in nodes:
        if isinstance(node, sympy.Mul):
            bases = [base for base, power in map(_power, node.args) if not _is_root(power)]
            if len(bases) > len(set(bases)):
                kinds.add("product of powers")
            if _is_expandable(node):
                kinds.add("product of sums")
        elif isinstance(node, sympy.Pow):
            base, power = node.args
            if base.free_symbols and power.is_Integer and power > 1:
                kinds |= {"product of sums"} if base.is_Add else set()
                kinds |= {"power of a product"} if base.is_Mul else set()
    if "product of sums" not in kinds and any(n.is_Add and n.free_symbols for n in nodes):
        kinds.add("sum of products")
    return kinds


def _power(factor: Any) -> tuple[Any, Any]:
    return factor.as_base_exp() if factor.is_Pow or factor.func is sympy.exp else (factor, 1)


def _is_root(power: Any) -> bool:
    return isinstance(power, sympy.Rational) and not power.is_Integer


def _is_expandable(node: Any) -> bool:
    factors = [arg for arg in node.args if arg.free_symbols]
    return len(factors) > 1 and any(arg.is_Add for arg in factors)


def _nodes(tree: Any) -> Iterator[Any]:
    entries = tree.flat() if isinstance(tree, sympy.MatrixBase) else [tree]
    for entry in entries:
        if isinstance(entry, sympy.Basic):
            yield from (
                node for node in sympy.preorder_traversal(entry) if isinstance(node, sympy.Expr)
            )


def _words(text: str) -> list[Any]:
    """An answer in words that the library reads as one: "about $x$", or its last number."""
    return _library(text, is_target=False) if has_words(text) else []


@functools.lru_cache(maxsize=256)
def _parse(text: str, is_target: bool = False) -> list[Any]:
    """Parse Sympy expressions; texts that are not mathematics have none."""
    return _library(f"${_plain(text)}$", is_target, is_formula=True)


def _plain(answer: str) -> str:
    """Write in LaTeX what the library does not read."""
    answer = in_latex(answer).replace("\\$", "").strip().strip("$").strip()
    answer = answer.removesuffix(".")
    if "\\pm" in answer:
        upper = answer.replace("\\pm", "+").replace("\\mp", "-").lstrip("+ ")
        lower = answer.replace("\\pm", "-").replace("\\mp", "+")
        answer = f"{upper}, {lower}"
    answer = _MIXED.sub(r"\1\\frac{\2}{\3}", answer)
    answer = _POWER.sub(r"\1\\cdot 10^{\2}", answer)
    answer = _PI.sub(r"\\pi ", answer)
    answer = _UNIT.sub("", answer)
    answer = _ROOT.sub(r"\\sqrt{\1}", answer)
    return _SHORT_FRACTION.sub(_whole_fraction, answer)


def _whole_fraction(match: re.Match[str]) -> str:
    name, *parts = [part for part in match.groups() if part is not None]
    name = "binom" if name.endswith("binom") else "frac"
    return rf"\{name}" + "".join(p if p.startswith("{") else f"{{{p}}}" for p in parts)


def _library(text: str, is_target: bool, is_formula: bool = False) -> list[Any]:
    # A cut box is the whole answer already: the library's own search for boxes is off.
    normal = NormalizationConfig(
        basic_latex=True,
        units=not is_formula,
        malformed_operators=is_target,
        nits=False,
        boxed="none",
    )
    config: list[Any] = [
        LatexExtractionConfig(boxed_match_priority=-1, normalization_config=normal)
    ]
    if not is_formula:  # else a number in what LaTeX cannot read would be the answer
        config.append(ExprExtractionConfig())
    # Silences a type that the library gives too narrowly: None turns its signals off.
    options: dict[str, Any] = {"parsing_timeout": None, "fallback_mode": "no_fallback"}
    return parse(text, extraction_config=config, **options)


# The library warns once that its own time-outs are off, which is on purpose.
logging.getLogger("math_verify").setLevel(logging.ERROR)
# The library's first formula may take seconds on a busy machine: that is part of the child's start.
_library("$\\frac{1}{2}$", is_target=True)
