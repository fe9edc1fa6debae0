"""Reads whether words around an answer deny, doubt, bound, suppose or retract it."""

from __future__ import annotations

import re

CLAUSE_END = re.compile(
    r"[,;]\s|\.\s|[.!?]$|\s(?:because|since|as|so|which|where|when|after|before|given)\b|(?<=[\w%])\s\("
)
DENIED = re.compile(
    r"(?:\b|(?=n't))(?:wrong|incorrect|false|unknown|undetermined|unsure|maybe|perhaps|possibly|probably|neither"
    r"|(?:i|a|my|just a) guess|impossible|unlikely|doubt(?:ful)?|cannot be (?:right|correct)|or so"
    r"|not (?:right|correct|sure|known|true|the answer)|n't (?:right|correct|sure|true|the answer)"
    r"|(?:not|n't) (?:think|believe)|no proof|cannot be the answer"
    r"|(?:cannot|can't|unable to) (?:be )?(?:determine|say|tell|know)"
    r"|don't know)",
    re.IGNORECASE,
)
DOUBTED = re.compile(
    r"(?:\b(?:not|never|cannot|might|could|may|hardly|anything but|unlikely to)|n't)"
    r"(?:\s(?:be|equal|to|exactly|really|just))*[\s$]*$",
    re.IGNORECASE,
)
BOUNDED = re.compile(
    r"\b(?:(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger) than|at (?:least|most)"
    r"|over|under|above|below|up to|between|from|exceeds"
    r"|other than|except|all but|by no means|minus|negative|divisible by"
    r"|(?:square|root|multiple|factor|opposite|inverse) of"
    r"|twice|double|triple|half(?: of)?|(?:third|quarter|fifth|tenth)s? of)\s?[$]?$",
    re.IGNORECASE,
)
_RETRACTED = re.compile(
    r"[^.,(\n\d]{0,30}(?:\(|(?:, |\.+ |\()(?:but|no|wait|however)\b)[^\n\d]{0,24}?"
    r"\b(?:wrong|incorrect|guess|not (?:right|correct|sure)|n't (?:right|correct|sure))\b",
    re.IGNORECASE,
)
"""Retraction of a number before it: `42. No, that is wrong.`"""
SUPPOSED = re.compile(
    r"\b(?:(?i:if|whether)\b[^,;.\n\d]{0,24}\b(?:were|was|had been|is)"
    r"|(?:(?i:suppos|assum)(?:e|ing)|(?i:imagine|let(?:'s (?:say|assume)|\s[A-Za-z]))|Were)\b"
    r"[^,;.\n\d]{0,24})(?:\s|=\s?)[$]?$"
)
_CONDITIONAL = re.compile(r"\bwould\b[^,;.\n\d]{0,24}\s[$]?$", re.IGNORECASE)
_CONDITION = re.compile(r"[^,;.\n\d]{0,24}\s(?:if|unless)\b", re.IGNORECASE)
CORRECTED = re.compile(r"\bnot\b[^.;\n]{1,60}?\bbut(?: rather)?\s", re.IGNORECASE)
CONTRASTED = re.compile(
    r"(\d[^.;\n\d]{0,24}?),?\s\(?(?:(?:(?<=,\s)|(?<=\()|(?:and|but)\s)not|rather than|instead of)\s[$]?"
    r"-?\d+(?:[.,]\d+)*(?:\s?%|\s[A-Za-z]+)?\)?(?=\s*(?:[.!;,)]|$))",
    re.MULTILINE,
)
"""Number after a "not" that follows another one: `42, not 41`."""


def is_withheld(text: str, start: int, end: int) -> bool:
    """Return whether the words of its clause deny it, doubt it or make it a bound."""
    begin = max(text.rfind(mark, 0, start) for mark in (". ", "; ", "\n", ", ", ": "))
    cut = CLAUSE_END.search(text, end)
    clause = text[begin + 1 : cut.start() if cut else len(text)]
    before = text[max(start - 40, 0) : start]
    if _RETRACTED.match(text, end):
        return True
    if _CONDITIONAL.search(before) and _CONDITION.match(text, end):
        return True
    return DENIED.search(clause) is not None or any(
        words.search(before) for words in (BOUNDED, DOUBTED, SUPPOSED)
    )
