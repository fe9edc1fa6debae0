r"""Reads one number with its unit, as answers write it: exact values (`Fraction`), never floats.

What a number may look like is the table in `tests/unit/rewards/test_quantities.py`. In short:

- sign, also Unicode's minus; decimals; thousands by commas, `{,}`, thin spaces, `\,`, apostrophes,
  and in a statement by spaces; `1.000.000` and `1.234,56`, but `1.000` is 1 and `1,5` is none;
- fractions `3/4`, `\frac{3}{4}`, `\frac34`, their Unicode signs, mixed numbers, repeating decimals
  (`0.\overline{3}`), `1.5e3`, `1.5 \times 10^3`, `10^3`, "3 million";
- currency signs, percent signs, degrees and units, with exponents, are dropped from the value.

What still has to be worked out is no number: `40 + 32`, `2^{10}`, `5!`, `\sqrt{16}`, a fraction that
is not in lowest terms. Nor are times and ratios (`3:30`), numbers of another base (`101_2`),
inequalities, `\pm 5`, and several numbers ("72 or 73", `1, 2`).
An equation stands for its last side where every side before is a name or has the same value.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from rlhf_cluster.rewards.rules.equations import equations
from rlhf_cluster.rewards.rules.final_answer import (
    Statement,
    target_statement,
)

MAX_NUMBER_CHARACTERS = 100
"""Longer runs of digits are no number: reading one takes time quadratic in its length."""
MAX_PROSE_CHARACTERS = 2000
"""A text without a marked answer is read so far from its end. A longer formula is no number."""

_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z0-9_^])(?<![0-9][.,])
    (?:(?<![)\]])(?P<sign>[-+])(?=[\d.{_CURRENCY}(]))?
    (?:(?P<currency>[{_CURRENCY}])\ ?(?P<inner>-(?=[\d.]))?)?
    (?P<digits>
        \d{{1,3}}(?:\.\d{{3}})+,\d{{1,2}}(?![\d.,]) | \d{{1,3}}(?:\.\d{{3}}){{2,}}(?![\d.,])
        | \d{{1,3}}(?:,\d{{3}})+(?![\d])(?!,\d)(?:\.\d+)?
        | \d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?![\d])(?!,\d)(?:\.\d+)?
        | \d+(?:\.\d+)? | (?<!\.)\.\d+
    )
    (?:
        [eE](?P<exponent>[-+]?\d{{1,3}})(?![A-Za-z0-9])
        | \ ?\*\ ?10\ ?\^\ ?\(?(?P<power_of_ten>-?\d{{1,3}})(?!\d)\)?
        | \ (?:and\ )?(?P<top>\d{{1,15}})(?P<bar>[/\u2044])(?P<bottom>\d{{1,15}})(?![\d.]\d|\d)
        | \ ?[/\u2044]\ ?(?P<denominator>-?\d{{1,100}})(?!\d)
        | \ ?\^\ ?\(?(?P<power>-?[A-Za-z\d]{{1,100}})\)?
        | (?P<odd>(?:[.,:]\d+)+ | _[({{]?\w+)
    )?
    (?:\ (?P<scale>thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE | re.ASCII,
)
_WHOLE = re.compile(r"-?\d{1,40}", re.ASCII)
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SUPERSCRIPTS = dict(
    zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789", strict=True)
)
_SUPERSCRIPTS["\u207b"] = "-"
_RAISED = {digit: sign for sign, digit in _SUPERSCRIPTS.items()}
_VULGAR = {
    "\u00bd": "12", "\u00bc": "14", "\u00be": "34", "\u2153": "13", "\u2154": "23", "\u2155": "15",
    "\u2156": "25", "\u2157": "35", "\u2158": "45", "\u2159": "16", "\u215a": "56", "\u215b": "18",
    "\u215c": "38", "\u215d": "58", "\u215e": "78",
}  # fmt: skip
_SIGNS = str.maketrans(
    {
        **{code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)},  # full width
        **dict.fromkeys("\u2212\u2013\u2010\u2011\ufe63", "-"),
        **dict.fromkeys("\u00d7\u00b7\u22c5\u2217", "*"),
        **dict.fromkeys("\u00f7\u2215", "/"),
        **{sign: f"\\frac{digits}" for sign, digits in _VULGAR.items()},
        "\u2019": "'",
        "\u3002": ". ",
        "\u3001": ", ",
        "\u00ba": "\u00b0",
        "\u221a": "\\sqrt",
        "\u03c0": "\\pi",
        "\u221e": "\\infty",
        "\u00b1": "\\pm",
    }
)
_RAISED_RUN = re.compile(rf"(?<=[\d)])[{''.join(_SUPERSCRIPTS)}]+")
_SEPARATOR = re.compile(r"(?<=\d)(?:\\[,;:! ]|[\u2009\u202f\u00a0~']|\{,\})(?=\d{3}(?!\d))")
_WRAPPED = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt)|mbox|hbox|operatorname|boldsymbol|bm|underline|phantom)"
    r"\s?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_REPEATING = re.compile(
    r"(?<![\w.])(\d{0,15})\.(\d{0,15})\\(?:overline|dot|bar)\s?(?:\{(\d{1,15})\}|(\d))"
)
_FRACTION = re.compile(
    r"(?P<whole>(?<![\w^_.])\d{1,15})?\s?\\[dtc]?frac\s?(?:\{\s?(?P<top>-?[\d,]{1,40})\s?\}|(?P<t>\d))"
    r"\s?(?:\{\s?(?P<bottom>-?[\d,]{1,40})\s?\}|(?P<b>\d))"
)
_DEGREES = re.compile(r"\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s?\^\s?\{?\s?(-?\d)\s?\}?(?!\d)")
_ORDINAL = re.compile(r"(?<=\d)\s?\^\s?\{?\s?(?:st|nd|rd|th)\s?\}?")
_SUBSCRIPT = re.compile(r"(?<=[A-Za-z])_(?:\{[^{}]{0,40}\}|\w)")
_COMMANDS = (
    ("\\left", ""), ("\\right", ""), ("\\displaystyle", ""), ("\\!", ""), ("\\$", "$"),
    ("\\%", "%"), ("\\#", "#"), ("\\&", "&"), ("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"),
    ("\\approx", "\u2248"),
    ("\\sim", "\u2248"), ("\\qquad", " "), ("\\quad", " "), ("\\(", " "), ("\\)", " "),
    ("\\[", " "), ("\\]", " "), ("\\,", " "), ("\\;", " "), ("\\:", " "), ("\\ ", " "),
    ("\\\\", " "), ("~", " "), ("**", " "), ("__", " "), ("`", " "),
    ("\u00a0", " "), ("\u202f", " "), ("\u2009", " "), ("\t", " "), ("\n", " "),
)  # fmt: skip
_SPACED = re.compile(r"(?<![\d.,/^*+=-])(?<![-+*/=^] )[1-9]\d{0,2}(?: \d{3})+(?![\d/,])(?! ?[/^])")
_SPACES = re.compile(r" {2,}")
_OPERATOR = re.compile(r"[\s()$\[\]]*[-+*/^][\s()$\[\]]*|\)?\(\s?")
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_RELATION = re.compile(
    r"[<>\u2264\u2265\u2260]=?\s*$|\\(?:le|ge|leq|geq|lt|gt|neq|ne|pm|mp|sqrt)\b\s*$|!=\s*$"
)
_CALL = re.compile(r"(?:\\[A-Za-z]+\s?|[A-Za-z]+)\(\s?$")
_STYLE = re.compile(
    r"\\(?:(?:bf|rm|it|sf|large|Large|LARGE|huge|Huge|normalsize|checkmark)(?![A-Za-z])"
    r"|color\s?\{[A-Za-z]{1,20}\})"
)
_CIRCUMSTANCE = re.compile(
    r"\b(?:in|after|for|over|with|on|at|within|during|by|if)\s[$]?$", re.IGNORECASE
)
_VARIABLE = re.compile(
    r"\s?(?:[xyznkijabuvqre](?![A-Za-z])|\\(?:pi|sqrt|theta|alpha|beta|infty|ln|log|sin|cos|tan|binom|mod|bmod|pmod|i)\b)"
)
_JOINED_AFTER = re.compile(r"\s?([A-Za-z%]*)\s?,?\s(?:or|and|OR)\s+(?:maybe |perhaps |even )?$")
_CLAUSE = re.compile(
    r"[,;]\s|\.\s|[.!?]$|\s(?:because|since|as|so|which|where|when|after|before|given)\b|(?<=[\w%])\s\("
)
_UNIT = re.compile(
    r"\s?(%|\u00b0 ?[CF]?|[$\u20ac\u00a3\u00a2]"
    r"|(?:(?:square|cubic|sq\.?|cu\.?) )?[A-Za-z]+[\u00b2\u00b3]?(?:/[A-Za-z]+\u00b2?)?)"
)
_REMARK = re.compile(r"\([^()]*\)\.?")
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*(?!:)")

_PROSE = re.compile(r"(?=.*[A-Za-z]{2})[^\\^{}\[\]|<>=+*/]*", re.DOTALL)
_APPLIED = re.compile(r"(?:[A-Za-z)]\s?[*/^]|(?<![A-Za-z])[A-Za-z]\s?[-+]|\)\s?[-+])\s?$")

_UNIT_NAMES = (
    "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre",
    "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "mg milligram",
    "oz ounce", "lb", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year yr",
    "l liter litre", "ml milliliter millilitre", "$ dollar usd", "\u00a2 cent", "\u20ac euro", "\u00a3",
    "% percent", "\u00b0 degree deg", "km/h kmh kph", "mph", "m/s",
)  # fmt: skip
_UNITS = {name: names.split()[0] for names in _UNIT_NAMES for name in names.split()}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit."""

    value: Fraction
    unit: str = ""
    """A common unit by one name, else nothing: words that are counted are no unit."""
    is_decimal: bool = False


@dataclass(frozen=True, slots=True)
class _Token:
    start: int
    end: int
    value: Fraction | None
    is_decimal: bool
    unit: str
    word: str


def read_formula(text: str, is_target: bool = False) -> Quantity | None:
    """The one number that a box or a target is; None for anything else, or more than it."""
    if len(text) > MAX_PROSE_CHARACTERS:
        return None
    text = _plain(text, spaced=True)
    if _is_tuple(text):
        return None
    exact, _, rounded = text.partition("\u2248")
    if rounded:
        return read_formula(exact) or read_formula(rounded)
    return _read_sides(text, lambda side: _read_strictly(side, is_target))


def read_sentence(text: str) -> Quantity | None:
    """The number that words state: the first one, or what an equation of its clause comes to."""
    bold = [part for part in _BOLD.findall(text) if _is_numeric(part)]
    text = _plain(bold[-1] if bold else text, spaced=True)
    tokens = _tokens(text)
    if not tokens:
        return None
    cut = _CLAUSE.search(text, tokens[0].end)
    clause = text[: cut.start()] if cut else text
    sides = _EQUALS.split(clause)
    if len(sides) > 1 and _NUMBER.search(sides[-1]):
        return _read_sides(clause, _read_first)
    return _read_first(text)


def read_prose(text: str) -> Quantity | None:
    """The last number of a text that marks no answer; a bold one of its line goes before."""
    if len(text) > MAX_PROSE_CHARACTERS:
        text = text[-MAX_PROSE_CHARACTERS:].partition(" ")[2]
    lines = [line for line in text.splitlines() if any(sign.isnumeric() for sign in line)]
    stated = [line for line in lines if not _REMARK.fullmatch(line.strip())]
    for line in reversed(stated or lines):
        for bold in reversed(_BOLD.findall(line)):
            if _is_numeric(bold):
                return read_sentence(bold)
        plain = _plain(line, spaced=False)
        tokens = _tokens(plain)
        tokens = [token for token in tokens if not _is_remark(plain, token)] or tokens
        if tokens:
            return _last(plain, tokens)
    return None


def read_statement(statement: Statement) -> Quantity | None:
    """The number of a completion's statement."""
    if _WHOLE.fullmatch(statement.text):
        return Quantity(Fraction(int(statement.text)))
    if statement.kind == "box":
        return read_formula(statement.text)
    if statement.kind == "prose":
        return read_prose(statement.text)
    return read_sentence(statement.text)


def read_target(text: str) -> Quantity | None:
    """The number of a row's target; none where an unmarked text has several."""
    marked = target_statement(text)
    if marked is not None:
        found = read_formula(marked.text, is_target=True)
        return found or (read_sentence(marked.text) if marked.kind == "hash" else None)
    found = read_formula(text, is_target=True)
    plain = _plain(text[-MAX_PROSE_CHARACTERS:], spaced=True)
    if found is None and _PROSE.fullmatch(plain) and len(_tokens(plain)) == 1:
        return read_prose(text)
    return found


def _is_numeric(text: str) -> bool:
    """Whether a number stands in it, and not in a label such as "Step 3:"."""
    return any(sign.isnumeric() for sign in text) and not text.rstrip().endswith(":")


def _read_sides(text: str, read: Callable[[str], Quantity | None]) -> Quantity | None:
    """What an equation comes to: its last side, where no side before says something else."""
    *before, last = _EQUALS.split(text)
    if before and not _NUMBER.search(last):
        before, last = [], text if len(before) > 1 else before[0]  # `72 = x`
    found = read(last)
    if found is None:
        return None
    for side in before:
        stated = _read_strictly(side, is_target=True)
        if stated is not None:
            if stated.value != found.value:
                return None
        elif not re.search(r"[A-Za-z?\u0080-\uffff]", side) and side.strip():
            written = f"{side}={last}".replace("\u2044", "/")
            if equations(written) != [True]:
                return None
    return found


def _read_strictly(text: str, is_target: bool) -> Quantity | None:
    tokens = _tokens(text)
    if not tokens:
        return None
    first = tokens[0]
    before, after = text[: first.start], text[first.end :]
    if "\\" in before or "\\" in after or re.match(r"\s?!", after):
        return None
    if len(tokens) > 1 and not re.fullmatch(r"[^()]*\s\([^()]*\)\W*", after):
        return None
    if re.search(r"[+*/^|<>]", before) or re.match(r"\s?(?:[-+*^<>|]|/\s?\d)", after):
        return None
    return _quantity(text, first, is_target, is_strict=True)


def _read_first(text: str) -> Quantity | None:
    tokens = _tokens(text)
    if not tokens:
        return None
    stated = [i for i, t in enumerate(tokens) if not _CIRCUMSTANCE.search(text[: t.start][-12:])]
    tokens = tokens[stated[0] :] if stated else tokens  # "In 7 days she earns 72"
    first = tokens[0]
    if len(tokens) > 1:
        second = tokens[1]
        between = text[first.end : second.start]
        if (
            _OPERATOR.fullmatch(between)
            or not between.strip()
            or _are_joined(first, second, between)
        ):
            return None
    return _quantity(text, first)


def _last(text: str, tokens: list[_Token]) -> Quantity | None:
    last = tokens[-1]
    if len(tokens) > 1:
        between = text[tokens[-2].end : last.start]
        if _OPERATOR.fullmatch(between) or _are_joined(tokens[-2], last, between):
            return None
    return _quantity(text, last)


def _is_remark(text: str, token: _Token) -> bool:
    """Whether it stands in parentheses after a word or a number: "72 kilometers (45 miles)"."""
    opening = text.rfind(" (", 0, token.start)
    return opening > 0 and ")" not in text[opening : token.start] and ")" in text[token.end :]


def _are_joined(one: _Token, other: _Token, between: str) -> bool:
    """Whether two numbers are offered side by side: "72 or 73", but not "72 hours or 3 days"."""
    joint = _JOINED_AFTER.fullmatch(between)
    if joint is None or one.value == other.value:
        return False
    return joint[1] in ("", other.word) or other.word == ""


def _quantity(
    text: str, token: _Token, is_target: bool = False, is_strict: bool = False
) -> Quantity | None:
    value = token.value
    before, after = text[: token.start], text[token.end :]
    if value is None or _RELATION.search(before[-12:]) or _CALL.search(before[-24:]):
        return None
    if _VARIABLE.match(after) or _APPLIED.search(before[-6:]):
        return None
    if is_strict and re.search(r"[A-Za-z\d]\s?[-+]\s?$", before):
        return None
    written = re.fullmatch(r"\D*([\d,]+) ?[/\u2044] ?(-?\d+)", text[token.start : token.end])
    if written and not is_target:
        bottom = abs(int(written[2]))
        if bottom == 1 or math.gcd(int(written[1].replace(",", "")), bottom) != 1:
            return None
    return Quantity(value, token.unit, token.is_decimal)


def _tokens(text: str) -> list[_Token]:
    return [_token(text, match) for match in _NUMBER.finditer(text) if not _is_name(text, match)]


def _is_name(text: str, match: re.Match[str]) -> bool:
    """COVID-19: a hyphen between a word and its number."""
    start = match.start("digits")
    return bool(re.search(r"[A-Za-z]{2}-$", text[max(start - 3, 0) : start]))


def _token(text: str, match: re.Match[str]) -> _Token:
    value = _value(match)
    unit = _UNIT.match(text, match.end())
    word = unit[1] if unit else ""
    name = "$" if match["currency"] == "$" else _unit(word)
    is_decimal = "." in match["digits"]
    return _Token(match.start(), match.end(), value, is_decimal, name, word)


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match[0]) > MAX_NUMBER_CHARACTERS or match["odd"]:
        return None
    digits = match["digits"]
    if digits.count(".") > 1 or ("." in digits and "," in digits[digits.index(".") :]):
        digits = digits.replace(".", "").replace(",", ".")
    value = Fraction(digits.replace(",", ""))
    if match["power"]:
        if digits != "10" or not re.fullmatch(r"-?\d{1,3}", match["power"]):
            return None
        value = Fraction(10) ** int(match["power"])
    if match["exponent"] or match["power_of_ten"]:
        value *= Fraction(10) ** int(match["exponent"] or match["power_of_ten"])
    if match["top"]:
        if "." in digits or int(match["bottom"]) == 0:
            return None
        value += Fraction(int(match["top"]), int(match["bottom"]))
    if match["denominator"]:
        if "." in digits or int(match["denominator"]) == 0:
            return None
        value /= int(match["denominator"])
    value *= _SCALES.get(match["scale"] or "", 1)
    return -value if match["sign"] == "-" or match["inner"] else value


def _unit(word: str) -> str:
    word = word.replace("square ", "\u00b2").replace("sq. ", "\u00b2").replace("sq ", "\u00b2")
    power = "".join(sign for sign in word if sign in "\u00b2\u00b3")
    if word.startswith(("cubic ", "cu ", "cu. ")):
        word, power = word.partition(" ")[2], "\u00b3"
    name = "".join(sign for sign in word if sign not in "\u00b2\u00b3 ").lower()
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    return known + power if known else ""


def _is_tuple(text: str) -> bool:
    text = text.strip().strip("$").strip()
    return text[:1] in "([{|" and ("," in text or ";" in text)


def _plain(text: str, spaced: bool) -> str:
    """`text` with one spelling for each sign; `spaced`: "12 345" is one number."""
    if not text.isascii():
        text = _RAISED_RUN.sub(_lowered, text).translate(_SIGNS)
    text = _SEPARATOR.sub(",", text.removesuffix("\\")).replace("\\!", "").replace("{,}", ",")
    if (text.count("$") - text.count("\\$")) % 2 == 0:  # pairs are of formulas
        text = text.replace("\\$", "\\usd").replace("$", "").replace("\\usd", "$")
    if "\\" in text or "^" in text or "_" in text:
        text = _plain_latex(text)
    for spelling, plain in _COMMANDS:
        if spelling in text:
            text = text.replace(spelling, plain)
    text = _SPACES.sub(" ", text)
    return _SPACED.sub(lambda match: match[0].replace(" ", ","), text) if spaced else text


def _plain_latex(text: str) -> str:
    for _ in range(3):  # \textbf{\text{...}}
        text, count = _WRAPPED.subn(r" \1 ", text)
        if not count:
            break
    text = _STYLE.sub("", text)
    text = _REPEATING.sub(_repeating, text)
    text = _FRACTION.sub(_fraction, text)
    text = _DEGREES.sub("\u00b0", text)
    text = _ORDINAL.sub("", text)
    text = _UNIT_POWER.sub(lambda match: "".join(_RAISED.get(c, c) for c in match[1]), text)
    text = _SUBSCRIPT.sub("", text)
    text = text.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")
    return text.replace("{", "").replace("}", " ")


def _lowered(match: re.Match[str]) -> str:
    return "^" + "".join(_SUPERSCRIPTS[sign] for sign in match[0])


def _repeating(match: re.Match[str]) -> str:
    whole, fixed, period = match[1] or "0", match[2], match[3] or match[4]
    value = Fraction(int(whole + fixed or 0)) + Fraction(int(period), 10 ** len(period) - 1)
    value /= 10 ** len(fixed)
    return f"{value.numerator}\u2044{value.denominator}"


def _fraction(match: re.Match[str]) -> str:
    top, bottom = match["top"] or match["t"], match["bottom"] or match["b"]
    whole = f"{match['whole']} " if match["whole"] else " " if match[0][:1] == " " else ""
    top, bottom = top.replace(",", ""), bottom.replace(",", "")
    return f"{whole}{top}\u2044{bottom} "
