r"""Brings a formula to plain text: one spelling for each sign, number and unit.

LaTeX, Unicode and Markdown have many: `\frac{3}{4}`, `3\u20444`, `\text{ cm}^2`, `1\,000`, `**72**`.
"""

from __future__ import annotations

import re
from fractions import Fraction

_SUPERSCRIPTS = dict(
    zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079", "0123456789", strict=True)
)
_SUPERSCRIPTS["\u207b"] = "-"
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
_ORNAMENT = re.compile(
    "[\u2020-\u2022\u2190-\u21ff\u2500-\u25cb\u25cd-\u27bf\u2b00-\u2bff\ufe0f\u20e3\U0001f000-\U0001faff]+"
)
_RAISED_RUN = re.compile(rf"(?<=[\da-zA-Z)])[{''.join(_SUPERSCRIPTS)}]+")
_SEPARATOR = re.compile(r"(?<=\d)(?:\\[,;:! ]|[\u2009\u202f\u00a0~']|\{,\})(?=\d{3}(?!\d))")
WRAPPED = re.compile(
    r"\\(?:text[a-z]*|math(?:rm|bf|it|sf|tt)|mbox|hbox|framebox|operatorname|ensuremath|boldsymbol|bm|underline|phantom)"
    r"\s?\{((?:[^{}]|\{[^{}]*\})*)\}"
)
_REPEATING = re.compile(
    r"(?<![\w.])(\d{0,15})\.(\d{0,15})\\(?:overline|dot|bar)\s?(?:\{(\d{1,15})\}|(\d))"
)
_FRACTION = re.compile(
    r"(?P<whole>(?<![\w^_.])\d{1,15})?\s?\\[dtc]?frac\s?(?:\{\s?(?P<top>-?[\d,]{1,40})\s?\}|(?P<t>\d))"
    r"\s?(?:\{\s?(?P<bottom>-?[\d,]{1,40})\s?\}|(?P<b>\d))"
)
_UNIT_FRACTION = re.compile(
    r"(?<=[\d\s,])\\[dt]?frac\s?\{\s*([A-Za-z]{1,12})\s*\}\s?\{\s*([A-Za-z]{1,12}(?:\^\d)?)\s*\}"
)
_ALIGNED = re.compile(r"\\(?:begin|end)\s?\{(?:align(?:ed)?|gather(?:ed)?|equation|split)\*?\}")
_CELL = re.compile(
    r"\\begin\s?\{(?:(?:array|tabular)\}\s?\{\s?\|?[clr]\|?\s?|matrix)\}(?:\s|\\hline(?![A-Za-z]))*+"
    r"((?:[^&\\]|\\(?!\\|end|begin|hline)){1,200})(?:\\\\|\s|\\hline)*+\\end\s?\{(?:array|tabular|matrix)\}"
)
"""Table of one cell."""
_DEGREES = re.compile(r"\s?\^\s?(?:\{\s?\\circ\s?\}|\\circ)|\\degree")
_ORDINAL = re.compile(r"(?<=\d)\s?\^\s?\{?\s?(?:st|nd|rd|th)\s?\}?")
_RAISED = re.compile(r"\^\s?\{([^{}]{2,40})\}")
_SUBSCRIPT = re.compile(r"(?<=[A-Za-z])_(?:\{[^{}]{0,40}\}|\w)")
_COMMANDS = (
    ("\\left", ""), ("\\right", ""), ("\\displaystyle", ""), ("\\$", "$"),
    ("\\%", "%"), ("\\#", "#"), ("\\&", "&"), ("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"),
    ("\\approx", "\u2248"),
    ("\\sim", "\u2248"), ("\\qquad", " "), ("\\quad", " "), ("\\(", " "), ("\\)", " "),
    ("\\[", " "), ("\\]", " "), ("\\,", " "), ("\\;", " "), ("\\:", " "), ("\\ ", " "),
    ("\\\\", " "), ("~", " "), ("**", " "), ("__", " "), ("`", " "),
    ("\u00a0", " "), ("\u202f", " "), ("\u2009", " "), ("\t", " "), ("\n", " "),
)  # fmt: skip
_SPACED = re.compile(r"(?<![\d.,/^*+=-])(?<![-+*/=^] )[1-9]\d{0,2}(?: \d{3})+(?![\d/,])(?! ?[/^])")
_SPACES = re.compile(r" {2,}")
_STYLE = re.compile(
    r"\\(?:(?:bf|rm|it|sf|large|Large|LARGE|huge|Huge|normalsize|checkmark|therefore"
    r"|Rightarrow|rightarrow|implies|blacksquare|square)(?![A-Za-z])|\\tag\{[^{}]{0,20}\}"
    r"|(?:color|[hv]space\*?)\s?\{[\w.-]{1,20}\})"
)


def with_plain_signs(text: str) -> str:
    """Return the text with ASCII or LaTeX for Unicode's digits, signs and fractions."""
    return _ORNAMENT.sub(" ", _RAISED_RUN.sub(_lower_digits, text).translate(_SIGNS))


def plain_text(text: str, spaced: bool) -> str:
    """`text` with one spelling for each sign; `spaced`: "12 345" is one number."""
    if not text.isascii():
        text = with_plain_signs(text)
    text = _SEPARATOR.sub(",", text.removesuffix("\\")).replace("\\!", "").replace("{,}", ",")
    if (text.count("$") - text.count("\\$")) % 2 == 0:  # pairs are of formulas
        text = text.replace("\\$", "\\usd").replace("$", "").replace("\\usd", "$")
    if "\\" in text or "^" in text or "_" in text:
        text = _plain_latex(text)
    text = text.replace("{", "").replace("}", " ")
    for spelling, plain in _COMMANDS:
        if spelling in text:
            text = text.replace(spelling, plain)
    text = _SPACES.sub(" ", text)
    return _SPACED.sub(lambda match: match[0].replace(" ", ","), text) if spaced else text


def _plain_latex(text: str) -> str:
    for _ in range(3):  # \textbf{\text{...}}
        text, count = WRAPPED.subn(r" \1 ", text)
        if not count:
            break
    text = _STYLE.sub("", text)
    text = _REPEATING.sub(_repeating, text)
    text = _FRACTION.sub(_fraction, text)
    text = _UNIT_FRACTION.sub(r" \1/\2 ", text)
    text = without_alignment(text)
    text = _DEGREES.sub("\u00b0", text)
    text = _ORDINAL.sub("", text)
    text = _RAISED.sub(_enclose_power, text)
    text = _SUBSCRIPT.sub("", text)
    return text.replace("\\{", "\\lbrace ").replace("\\}", "\\rbrace ")


def without_alignment(text: str) -> str:
    """Remove what places a formula on lines, and a table around one cell."""
    return _CELL.sub(r" \1 ", _ALIGNED.sub("", text)).replace("&=", "=")


def _enclose_power(match: re.Match[str]) -> str:
    """Put a power in parentheses where it is arithmetic."""
    return f"^({match[1]})" if re.search(r"[\d)] ?[-+*/]", match[1]) else match[0]


def _lower_digits(match: re.Match[str]) -> str:
    return f"^{{{''.join(_SUPERSCRIPTS[sign] for sign in match[0])}}}"


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
