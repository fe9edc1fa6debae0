r"""Reads one number with its unit, as answers write it: exact values (`Fraction`), never floats.

A formula (a box, a target, `$...$`, a statement without words) is a number where all of it matches

    formula  = {side "="} quantity            side: a name, or arithmetic of the same value
    quantity = {word} number [unit] {word} ["(" remark ")"] ["."]
    number   = [sign] [currency] digits       or in parentheses
    unit     = "%" | degrees | currency | word [power] ["/" word [power]]

and nothing else: `x = 72`, `\text{Total: } 72 \text{ cm}^2`, `48 + 24 = 72`, but not `x^2+1`, `3x`,
`2\sqrt{3}`, `40 + 32`, `5!`, `x > 5`, `\pm 5`, `1, 2`, `3:30`, `101_2`. Digits are

- decimals; thousands by commas, `{,}`, thin spaces, `\,`, apostrophes, spaces; `1.000.000` and
  `1.234,56`, but `1.000` is 1 and `1,5` is none;
- fractions `3/4`, `\frac{3}{4}`, `\frac34` in lowest terms, mixed numbers, repeating decimals
  (`0.\overline{3}`), `1.5e3`, `1.5 \times 10^3`, `10^3`, "3 million".

In a marked sentence the number that it begins with counts ("72, which is 8 more"), else the last one
of its first clause with a number ("the 5 boys have 72"); in prose the last one of the last line; a bold
one goes first. A number that is denied ("not 6"), hedged ("maybe 6"), bounded ("more than 6"), in a
range or a list ("6 to 7", "6, 7") does not count, neither does a supposed one ("if it were 6").
"6, not 7", "6 of 7", "6 in 7" and "6 is 5% of 120" are 6.
`tests/support/builders/answer_table.py` has verdicts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from rlhf_cluster.rewards.rules.equations import equations
from rlhf_cluster.rewards.rules.final_answer import FORMULA, Statement, target_statement
from rlhf_cluster.rewards.rules.plain_text import plain_text
from rlhf_cluster.rewards.rules.withheld import (
    BOUNDED,
    CLAUSE_END,
    CONTRASTED,
    CORRECTED,
    DENIED,
    DOUBTED,
    REFERENCE,
    SUPPOSED,
    is_withheld,
)

MAX_NUMBER_CHARACTERS = 100
"""Longest run of digits that is read: reading one takes time quadratic in its length."""
MAX_PROSE_CHARACTERS = 2000
"""Characters at the end of a text without a marked answer that are read, and of a formula at most."""

_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_NUMBER = re.compile(
    rf"""
    (?<![A-Za-z0-9_^])(?<![0-9][.,])
    (?:(?<![)\]])(?P<sign>[-+])(?=[\d.{_CURRENCY}(]))?
    (?:(?P<currency>(?:US|[ACS])?[{_CURRENCY}]|USD|EUR|GBP|INR)\ ?(?P<inner>-(?=[\d.]))?)?
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
    (?:\ (?P<scale>hundred|thousand|million|billion|trillion)\b)?
    """,
    re.VERBOSE | re.ASCII,
)
_WHOLE = re.compile(r"-?\d{1,40}", re.ASCII)
_SCALES = {
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_OPERATOR = re.compile(
    r"[\s()$\[\]]*(?:[-+*/^\u2248]|:(?!\s)|(?<=\s):|\\pm|\+/-)[\s()$\[\]]*|\)?\(\s?"
    r"|\s(?:times|plus|minus|less|by|divided by|multiplied by|groups of)\s(?:the )?"
)
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
_ARITHMETIC = re.compile(r"(?=.*\d)[\d\s.,+*/^()$\u2044-]+")
_COMPARED = re.compile(r"[^A-Za-z?\u0080-\uffff<>|]*[<>|][^A-Za-z?\u0080-\uffff]*")
_NEXT_NAME = re.compile(r"\d[^A-Za-z]{0,8}(?:[,;]|\b(?:or|and)\b)\s*[A-Za-z]\s*$")
"""`x = 1, y = 2` is several answers."""
_RELATION = re.compile(
    r"[<>\u2264\u2265\u2260]=?\s*$|\\(?:le|ge|leq|geq|lt|gt|neq|ne|pm|mp|sqrt)\b\s*$|!=\s*$"
)
_CALL = re.compile(r"(?:\\[A-Za-z]+\s?|[A-Za-z]+)\(\s?$")
_CIRCUMSTANCE = re.compile(
    r"\b(?:in|after|with|within|during|over|from|if|all|every|per|until)\s[$]?$"
    r"|\b(?:for|at|the|[a-z]+'s|day|age|year|week|month|level|grade)\s$",
    re.IGNORECASE,
)
_VARIABLE = re.compile(
    r"\s?(?:(?:[xyznkijbuvqre]|a(?! [A-Za-z]))(?![A-Za-z])"
    r"|\\(?:pi|sqrt|theta|alpha|beta|infty|ln|log|sin|cos|tan|binom|mod|bmod|pmod|i)(?![A-Za-z]))"
)
_JOINED = re.compile(
    r"\s?([A-Za-z%]*)\s?(?:,|,?\s\(?(?:or|and|OR|to|through|versus)\s+)\s?(?:maybe |perhaps |even )?"
)
_BESIDE = re.compile(r"\s?[A-Za-z.$]*,?(?:\sand)?\s?")
_GOES_ON = re.compile(
    r"\s?(?:\?|\\pm|\\mp|\+/-|[-+*^<>|]|(?:times|plus|minus) (?:some|the|tax)|divided (?:by|among)\b"
    r"|(?:times|plus|minus|(?:more|less|fewer) than) (?!a [a-z])[A-Za-z](?![A-Za-z])|!(?=\s*[\d$])"
    r"|(?:(?:more|less|fewer) than [$]?\d|in base \d)"
    r"|(?:squared|cubed|choose|factorial|(?:or|and) (?:so|more|less|fewer|up"
    r"|higher|lower|above|below))\b"
    r"|\(?mod\b|(?:(?<=\d)[KkM]|mil|bn|lakh|crore|tenths?|hundredths?|thousandths?)\b)"
)
"""Words that change the number before them, or take it back."""
_OF = re.compile(r"%?\s(?:(?:out )?of|in) (?:the |all |all the )?[$]?")
_IS = re.compile(r"\s(?:is|are|equals)\s")
_NO_ANSWER = re.compile(
    r"(?:^|[.:;]\s|\b(?:is|have|give|find)\s)no (?:final )?answer\s*(?:[.;,:!]|$)", re.IGNORECASE
)
_UNREAD = "\u25cc"
"""Replaces a formula in a sentence that is not a number."""
_BEFORE = re.compile(r"[\s(]*\u2248?\s?(?:[A-Za-z][A-Za-z'-]*+(?:\s?[:,.])?+\s++){0,12}+[\s(]*")
_AFTER = re.compile(
    r"(?:\s?(?:%|\u00b0\s?[CF]?|[$\u20ac\u00a3\u00a2]))?"
    # Possessive: letters are one word, else a long sentence could be cut in a myriad of ways.
    r"(?:[\s/,*-]{0,3}+[A-Za-z][A-Za-z'-]*+\.?(?:[\u00b2\u00b3]|\s?\^\s?\(?-?\d\)?)?){0,12}+"
    r"\s*\)?(?:\s\([^()]*\))?[\s.]*"
)
_SHORT_WORD = re.compile(r"[aI]|[ai][nst]|am|by|he|it|m[ey]|no|o[fnr]|so|to|u[ps]|we|[ap]m")
_FUNCTION = re.compile(r"sin|cos|tan|cot|sec|csc|log|exp|sqrt|gcd|lcm|mod|max|inf")
_UNIT = re.compile(
    r"\s?(%|\u00b0 ?[CF]?|[$\u20ac\u00a3\u00a2]"
    r"|(?:(?:square|cubic|sq\.?|cu\.?) )?[A-Za-z]+"
    r"(?:[\u00b2\u00b3]|\s?\^\s?[23])?(?:/[A-Za-z]+\u00b2?)?)"
)
_REMARK = re.compile(
    r"\([^()]*[A-Za-z][^()]*\)\.?|\W*(?:confidence|certainty|difficulty|source|note|n\.?b|p\.?s|hope"
    r"|i hope|feel free|let me know|(?:would|do) you|if you (?:want|need|have|would))\b.*|.*\?\W*",
    re.IGNORECASE,
)
_QUESTION = re.compile(r"(?<=[A-Za-z\d*])[.!]\**\s+[A-Z][^.!?\d\n]{1,120}\?\W*\Z")
"""Question to the user after the last sentence: `Tom has 72. Is there anything else?`"""
_CERTAIN = re.compile(r"\s?%\s(?:sure|certain|confident)\b")
_AROUND = " .!*_='\"\u201c\u201d\u00ab\u00bb\u2026"
_LEADING = re.compile(rf"^(?:(?!(?<!\.)\.\d)[{_AROUND}])+")  # but the point of ".5"
_LABEL = re.compile(
    r"^[\s*_]*(?:\([A-Za-z]\)|[A-Za-z]\)|[A-Z][.:]|[A-E](?:,|(?= \([^()]*\)[\s.*_]*$)))[\s*_]+"
)
"""Letter of a choice before what it stands for: `B) 42`, `B (42)`."""
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*(?!:)")

_PROSE = re.compile(r"(?=.*[A-Za-z]{2})[^\\^{}\[\]|<>=+*/]*", re.DOTALL)
_APPLIED = re.compile(
    r"(?:[A-Za-z)]\s?[*/^]|(?<![A-Za-z])[A-Za-z]\s?[-+]|\)\s?[-+]|\d\s?[-+*/])\s?$"
)

_UNIT_NAMES = (
    "m meter metre", "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre",
    "in inch inche", "ft foot feet", "yd yard", "mi mile", "g gram", "kg kilogram", "mg milligram",
    "oz ounce", "lb", "s sec second", "min minute", "h hr hour", "day", "week", "month", "year yr",
    "l liter litre", "ml milliliter millilitre", "$ dollar usd", "\u00a2 cent", "\u20ac euro", "\u00a3",
    "% percent", "\u00b0 degree deg", "km/h kmh kph", "mph", "m/s",
)  # fmt: skip
_SMALLER = {"year": "month", "week": "day", "day": "h", "h": "min", "min": "s", "ft": "in", "lb": "oz",
            "$": "\u00a2", "km": "m", "m": "cm", "kg": "g", "l": "ml"}  # fmt: skip
"""The unit after a number and before a smaller one of the same quantity: `3 hours 20 minutes`."""
_UNITS = {name: names.split()[0] for names in _UNIT_NAMES for name in names.split()}


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number and its unit."""

    value: Fraction
    unit: str = ""
    """A common unit by one name, else empty: words that are counted are not a unit."""
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
    if len(text) > MAX_PROSE_CHARACTERS or DENIED.search(text):
        return None
    text = _LABEL.sub("", plain_text(text, spaced=True))
    exact, *_, rounded = text.split("\u2248") if "\u2248" in text else ("", "")
    if rounded:
        return read_formula(exact) or read_formula(rounded)
    return _read_sides(text, lambda side: _read_whole(side, is_target))


def read_sentence(text: str) -> Quantity | None:
    """The number that words state, by the rule above."""
    if len(text) > MAX_PROSE_CHARACTERS:
        return None
    bold = [part for part in _BOLD.findall(text) if _is_numeric(part)]
    text = CONTRASTED.sub(r"\1", CORRECTED.sub("", bold[-1] if bold else text))
    text = _LABEL.sub("", plain_text(FORMULA.sub(_inline, text), spaced=True))
    if not re.search(r"[A-Za-z]{2}|[\u3040-\u9fff]", text):
        return read_formula(_LEADING.sub("", text).rstrip(_AROUND))
    tokens = _tokens(text)
    stated = _drop_circumstances(text, tokens)
    if not tokens:
        return None
    start = (stated or tokens)[0]
    cut = CLAUSE_END.search(text, start.end)
    clause = text[: cut.start()] if cut else text
    begins = not re.search(r"[A-Za-z]", text[: tokens[0].start])
    if "=" in (clause if begins else text):
        return _read_result(clause if begins else text)
    among = [token for token in stated or tokens if token.end <= len(clause)]
    return _choose(text, tokens, tokens.index(tokens[0] if begins else among[-1]))


def _read_result(text: str) -> Quantity | None:
    """Read the value of the last equation of a sentence."""
    *_, before, last = _EQUALS.split(text)
    if SUPPOSED.search(f"{before[-40:]} "):
        return None
    if not _NUMBER.search(last):  # "20 = A"
        tokens = _tokens(before)
        return _choose(before, tokens, len(tokens) - 1)
    cut = CLAUSE_END.search(last, _tokens(last)[0].end) if _tokens(last) else None
    result = last[: cut.start()] if cut else last
    return _read_sides(f"{before}={result}", lambda side: _choose(side, _tokens(side), 0))


def read_prose(text: str) -> Quantity | None:
    """The last number of a text that marks no answer; a bold one of its line goes before."""
    if len(text) > MAX_PROSE_CHARACTERS:
        text = text[-MAX_PROSE_CHARACTERS:].partition(" ")[2]
    text = FORMULA.sub(_inline, _QUESTION.sub(".", text))
    lines = [line for line in text.splitlines() if _is_numeric(line) or _UNREAD in line]
    stated = [line for line in lines if not _REMARK.fullmatch(line.strip())]
    for line in reversed(stated or lines):
        for bold in reversed(_BOLD.findall(line)):
            if _is_numeric(bold):
                return read_sentence(bold)
        if _NO_ANSWER.search(line):
            return None
        plain = plain_text(CONTRASTED.sub(r"\1", line), spaced=False)
        tokens = _tokens(plain)
        tokens = [token for token in tokens if not _is_remark(plain, token)] or tokens
        if tokens and _EQUALS.search(plain) and re.search(r"[A-Za-z]{2}", plain):
            return _read_result(plain)
        if tokens:
            stated = _drop_circumstances(plain, tokens) or tokens
            return _choose(plain, tokens, tokens.index(stated[-1]))
    return None


def _drop_circumstances(text: str, tokens: Sequence[_Token]) -> list[_Token]:
    """Drop numbers of circumstances, such as "in 5 days"."""
    return [
        token
        for token in tokens
        if not any(words.search(text[: token.start][-24:]) for words in (_CIRCUMSTANCE, REFERENCE))
    ]


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
    plain = plain_text(text[-MAX_PROSE_CHARACTERS:], spaced=True)
    if (
        found is None
        and " " in plain.strip()
        and _PROSE.fullmatch(plain)
        and len(_tokens(plain)) == 1
    ):
        return read_prose(text)
    return found


def _is_numeric(text: str) -> bool:
    """Whether the text has a number, and is not a label such as "Step 3:"."""
    return any(sign.isnumeric() for sign in text) and not text.rstrip().endswith(":")


def _read_sides(text: str, read: Callable[[str], Quantity | None]) -> Quantity | None:
    """Read the value of an equation: its last side, where no side before differs."""
    *before, last = _EQUALS.split(text)
    if before and not _NUMBER.search(last):
        before, last = [], text if len(before) > 1 else before[0]  # `72 = x`
    if any(_NEXT_NAME.search(side) for side in before):
        return None
    found = read(last)
    if found is None and len(before) == 1 and _ARITHMETIC.fullmatch(last):
        [other], before = before, [last]  # `72 = 40 + 32`
        last, found = other, read(other)
    if found is None:
        return None
    for side in before:
        stated = _read_whole(side, is_target=True)
        if stated is not None and stated.value == found.value:
            continue
        if _ARITHMETIC.fullmatch(side):
            if equations(f"{side}={last}".replace("\u2044", "/")) != [True]:
                return None
        elif stated is not None or _COMPARED.fullmatch(side):
            return None
    return found


def _inline(match: re.Match[str]) -> str:
    """Return the number of a formula in words, else a sign that none was read."""
    formula = next(part for part in match.groups() if part is not None)
    if re.search(r"[A-Za-z]{2} ", formula) and "\\" not in formula:  # "$5 a day and $"
        return match[0]
    if read_formula(formula) is None:
        return f" {_UNREAD} "
    return f" {_EQUALS.split(formula)[-1].replace('&', '')} "


def _read_whole(text: str, is_target: bool) -> Quantity | None:
    """The quantity that all of the text is, by the grammar above."""
    tokens = _tokens(text)
    if not tokens:
        return None
    first = tokens[0]
    before, after = text[: first.start], text[first.end :]
    if not (_BEFORE.fullmatch(before) and _AFTER.fullmatch(after) and first.value is not None):
        return None
    if before.count("(") != after.partition(" (")[0].count(")") or BOUNDED.search(before):
        return None
    if DOUBTED.search(before):
        return None
    words = re.findall(r"[A-Za-z]+", before + " " + after.partition(" (")[0])
    if not all(_is_word(word) for word in words) or re.match(r"[A-Za-z](?![A-Za-z])", after):
        return None
    return _quantity(text, first, is_target)


def _is_word(word: str) -> bool:
    """Whether letters are a word or a unit, and no product of variables."""
    if _SHORT_WORD.fullmatch(word) or _unit(word):
        return True
    return (
        len(word) > 2
        and not _FUNCTION.fullmatch(word)
        and re.search("(?i)[aeiouy]", word) is not None
    )


def _choose(text: str, tokens: list[_Token], index: int) -> Quantity | None:
    """The number at `index`, where it is neither denied, bounded nor one of several."""
    if not tokens:
        return None
    if index and _OF.fullmatch(text[tokens[index - 1].end : tokens[index].start]):
        index -= 1  # "42 of 50" is 42, and "2/3 of 60" is arithmetic
        value = tokens[index].value
        if index and _IS.fullmatch(text[tokens[index - 1].end : tokens[index].start]):
            index -= 1  # "10 is 20% of 50" is 10
        elif value is None or value.denominator != 1:
            return None
    token = tokens[index]
    for one, other in pairwise(tokens[max(index - 1, 0) : index + 2]):
        between = text[one.end : other.start]
        if not between.strip() or _OPERATOR.fullmatch(between):
            return None
        # "3 hours 20 minutes" is one quantity, and neither of its numbers
        if one.unit and _SMALLER.get(one.unit) == other.unit and _BESIDE.fullmatch(between):
            return None
        if _are_joined(one, other, between, not _drop_circumstances(text, [one])):
            return None
    if is_withheld(text, token.start, token.end):
        return None
    if _GOES_ON.match(text, token.end):
        return None
    return _quantity(text, token)


def _is_remark(text: str, token: _Token) -> bool:
    """Return whether it is in parentheses after a word, "72 km (45 miles)", or how certain it is."""
    if _CERTAIN.match(text, token.end):
        return True
    opening = text.rfind(" (", 0, token.start)
    return opening > 0 and ")" not in text[opening : token.start] and ")" in text[token.end :]


def _are_joined(one: _Token, other: _Token, between: str, is_circumstance: bool) -> bool:
    """Whether two numbers are offered side by side: "72 or 73", "72 boys and 3 girls".

    The same in another unit, "72 hours or 3 days", is one."""
    joint = _JOINED.fullmatch(between)
    if joint is None or one.value == other.value:
        return False
    if is_circumstance and joint[1] and between.endswith(", "):  # "in 7 days, 42"
        return False
    return joint[1] in ("", other.word) or other.word == "" or "and" in between.split()


def _quantity(text: str, token: _Token, is_target: bool = False) -> Quantity | None:
    value = token.value
    before, after = text[: token.start], text[token.end :]
    if value is None or _RELATION.search(before[-12:]) or _CALL.search(before[-24:]):
        return None
    if _VARIABLE.match(after) or _APPLIED.search(before[-6:]):
        return None
    written = re.fullmatch(r"\D*([\d,]+) ?[/\u2044] ?(-?\d+)", text[token.start : token.end])
    if written and not is_target:
        bottom = abs(int(written[2]))
        if bottom == 1 or math.gcd(int(written[1].replace(",", "")), bottom) != 1:
            return None
    return Quantity(value, token.unit, token.is_decimal)


def _tokens(text: str) -> list[_Token]:
    found = [_token(text, match) for match in _NUMBER.finditer(text) if not _is_name(text, match)]
    unread = [
        _Token(match.start(), match.end(), None, False, "", "")
        for match in re.finditer(_UNREAD, text)
    ]
    return sorted(found + unread, key=lambda token: token.start) if unread else found


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
    word = re.sub(r"\s?\^\s?([23])", lambda match: "\u00b2\u00b3"[int(match[1]) - 2], word)
    power = "".join(sign for sign in word if sign in "\u00b2\u00b3")
    if word.startswith(("cubic ", "cu ", "cu. ")):
        word, power = word.partition(" ")[2], "\u00b3"
    name = "".join(sign for sign in word if sign not in "\u00b2\u00b3 ").lower()
    known = _UNITS.get(name) or _UNITS.get(name.removesuffix("s"))
    return known + power if known else ""
