r"""Reads formulas as they are written, before the library works anything out in them.

Two answers are spelled alike (`alike`) where both spellings are usual and differ for the library:
`x = 3, y = 4` is `(3, 4)`; `x = 1 \text{ or } x = 2` is `1, 2`; `3 \le x < 4` and `x \in [3, 4)` are
`[3, 4)`. Only the side that has the names is rewritten, and only where the other has none. Signs
of Unicode become LaTeX.

An answer with more operations than its target (`operations`) restates the problem:
`\sqrt{2} + \sqrt{8}` for `3\sqrt{2}`, `\ln 4 - \ln 2`, `14x + x + 3`. A formula with n numbers and
names has n - 1 operations of two arguments; functions (`\ln`, `\sqrt`) are one each. Not counted are
signs and a 1 above or below a fraction's bar, since `\frac{1}{2}x` and `x/2`, or `-x+1` and `1-x`,
are one formula.
"""

from __future__ import annotations

import re

from rlhf_cluster.rewards.rules.final_answer import MAX_STATEMENT_CHARACTERS
from rlhf_cluster.rewards.rules.plain_text import with_plain_signs, without_alignment

_ROOT = re.compile("\u221a ?(?:(\\d+|[A-Za-z])|\\(([^()]{1,80})\\))")
_SIGNS = str.maketrans(
    {
        "\u2264": "\\le ", "\u2265": "\\ge ", "\u2260": "\\ne ", "\u222a": "\\cup ",
        "\u2208": "\\in ", "\u2229": "\\cap ", "\u03b8": "\\theta ", "\u03c0": "\\pi ",
        "\u221e": "\\infty ", "\u00b1": "\\pm ", "\u00d7": "\\times ", "\u00b7": "\\cdot ",
        "\u22c5": "\\cdot ", "\u00f7": "/",
    }
)  # fmt: skip
_STYLE = re.compile(r"\\(?:mathbf|boldsymbol|bm|displaystyle)(?![A-Za-z])")
_NATURAL = re.compile(r"\\log\s?_\s?(?:e|\{\s?e\s?\})")
_BETWEEN = re.compile(r"(?<![{\s])(?:\s?\$)?\s+(or|and)\s+(?:\$\s?)?")
_INFINITY = re.compile(r"(?<![\\A-Za-z])(?:inf|infinity)(?![A-Za-z])")
_MEMBER = re.compile(r"^\s*[A-Za-z]\s*\\in(?![A-Za-z])\s*(?!\\mathbb)")
_LISTED = re.compile(
    r",|;|\\text\s?\{\s*(?:or|and),?\s*\}|\\(?:lor|vee)(?![A-Za-z])|\b(?:or|and)\b"
)
_ASSIGNED = re.compile(r"\s*([A-Za-z])(_\{?\w{1,4}\}?)?\s*=\s*([^=]*[^=\s])\s*")
_SIGN = r"\s*(<|>|\\l[et]q?(?![a-z])|\\g[et]q?(?![a-z]))\s*"
_RELATION = re.compile(_SIGN)
_OR = re.compile(r"\\text\s?\{\s*or\s*\}|\bor\b|\\cup(?![A-Za-z])")
_NAME = re.compile(r"[A-Za-z]")
_DROPPED = re.compile(
    r"\\(?:text[a-z]*|mbox|mathrm|operatorname)\s?\{[^{}]*\}|\\(?:begin|end)\s?\{[^{}]*\}"
    r"|_(?:\{[^{}]{0,40}\}|\w)"  # subscripts are of a name
    r"|\^\s?\{?\s?\\circ\s?\}?|\^\s?\{\s?-1\s?\}"
    r"|(?<=frac)\s?(?:\{\s?1\s?\}|1)|(?<![\w.}])1\s?/"
    r"|\\sqrt\s?(?=\[)"  # \sqrt[3]{2} has the operations of 2^{1/3}
)
_COUNTED = re.compile(
    r"\d+(?:\.\d+)?|\\(?P<command>[A-Za-z]+)|(?:sqrt|pi|sin|cos|tan|ln|log|exp)(?![a-z])|[A-Za-z]"
)
_SILENT = re.compile(
    "[dtc]?frac|cdot|times|div|left|right|displaystyle|q?quad|pm|mp|cup|cap|in|to|and|or|mid|colon"
    "|[lg][et]q?|neq?|math[a-z]+|boldsymbol|circ|degree|setminus|[lc]?dots|[bB]igg?[lr]?|[lr]brace"
    "|[lr]angle|[lr]vert|limits|pmod"
)
_BAR = r"\\[dtc]?frac\s?\{(?:[^{}]|\{[^{}]{0,80}\}){1,80}\}\s?\{"
_DENOMINATOR = re.compile(rf"{_BAR}(\d{{1,20}})\}}|/\s?(\d{{1,20}})")
_ROOT_BELOW = re.compile(rf"{_BAR}[^{{}}]{{0,80}}\\sqrt|/\s?\(?\\sqrt")
_RADICAND = re.compile(r"\\sqrt\s?\{(\d{1,6})\}")


def alike(target: str, answer: str) -> tuple[str, str]:
    """Both sides, the one with names or relations as the values that the other one has."""
    if len(answer) > MAX_STATEMENT_CHARACTERS:
        return target, answer
    target, answer = _plain(target), _plain(answer)
    for marks, write in (("=", _values), (_RELATION, _intervals)):
        has = [re.search(marks, side) is not None for side in (target, answer)]
        if has == [True, False]:
            target = write(target, answer)
        elif has == [False, True]:
            answer = write(answer, target)
    return target, answer


def in_latex(text: str) -> str:
    """The text with LaTeX for signs of Unicode, `\\ln` for `\\log_e`, and without styles."""
    text = _NATURAL.sub(r"\\ln ", _STYLE.sub("", text)).replace("\\varnothing", "\\emptyset")
    text = _BETWEEN.sub(r" \\text{ \1 } ", _INFINITY.sub(r"\\infty", text))
    if text.isascii():
        return text
    text = _ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text).translate(_SIGNS)
    return with_plain_signs(text)


def operations(formula: str) -> int:
    """The operations of a formula in LaTeX, and one; a denominator of several terms counts once."""
    # A denominator of 1 may be among what is dropped, and would then be subtracted uncounted.
    below = [d for d in map("".join, _DENOMINATOR.findall(formula)) if int(d) != 1]
    counted = sum(
        not (found["command"] and _SILENT.fullmatch(found["command"]))
        for found in _COUNTED.finditer(_DROPPED.sub(" ", formula))
    )
    return counted - (len(below) - len(set(below)))


def spare_operations(target: str) -> int:
    r"""The operations that simplifying a target may add: `\frac{1}{\sqrt{2}}`, `\sqrt{12}`."""
    squares = sum(
        any(int(n) % k**2 == 0 for k in range(2, 1000) if k**2 <= int(n))
        for n in _RADICAND.findall(target)
    )
    return squares + len(_ROOT_BELOW.findall(target))


def _plain(text: str) -> str:
    text = without_alignment(in_latex(text)).strip().strip("$")
    return _MEMBER.sub("", text.removeprefix("\\(").removesuffix("\\)"))


def _values(text: str, other: str) -> str:
    """The values of several assignments: a list of one name's, or a tuple in the names' order."""
    parts = [_ASSIGNED.fullmatch(part) for part in _LISTED.split(text)]
    found = [part.groups("") for part in parts if part is not None]
    if len(found) < max(len(parts), 2):
        return text
    names = {(name, index) for name, index, _ in found}
    is_tuple = other.lstrip().startswith(("(", "\\left("))
    if len({name for name, _ in names}) == 1 and not (is_tuple and len(names) == len(found)):
        return ", ".join(value for *_, value in found)
    if len(names) < len(found):
        return text
    return f"({', '.join(value for *_, value in sorted(found))})"


def _intervals(text: str, other: str) -> str:
    """The intervals that inequalities of one name are; the text where it is none."""
    found = [_interval(_RELATION.split(part.strip())) for part in _OR.split(text)]
    whole = [one for one in found if one is not None]
    return r" \cup ".join(whole) if len(whole) == len(found) else text


def _interval(parts: list[str]) -> str | None:
    """The interval of `3 \\le x < 4`, or of `x < 4`, by its parts and signs."""
    signs = parts[1::2]
    if len({sign.startswith(("<", "\\l")) for sign in signs}) != 1:
        return None
    if not signs[0].startswith(("<", "\\l")):
        parts = parts[::-1]
    if len(parts) == 3:
        ends = ["-\\infty", "<", *parts] if _NAME.fullmatch(parts[0]) else [*parts, "<", "\\infty"]
    else:
        ends = parts
    if len(ends) != 5 or not _NAME.fullmatch(ends[2]):
        return None
    low, first, _, second, high = ends
    closed = [sign not in "<>" and "t" not in sign for sign in (first, second)]
    return f"{'[' if closed[0] else '('}{low}, {high}{']' if closed[1] else ')'}"
