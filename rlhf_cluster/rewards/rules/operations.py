r"""Counts the operations of a formula as it is written, before anything in it is worked out.

An answer with more operations than its target restates the problem: `\sqrt{2} + \sqrt{8}` for
`3\sqrt{2}`, `\ln 4 - \ln 2`, `14x + x + 3`. A formula with n numbers and names has n - 1 operations of
two arguments; functions (`\ln`, `\sqrt`) are one each. Not counted are signs and a 1 above or below
a fraction's bar, since `\frac{1}{2}x` and `x/2`, or `-x+1` and `1-x`, are one formula.
"""

from __future__ import annotations

import re

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
