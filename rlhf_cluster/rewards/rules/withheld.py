"""Reads whether words around an answer deny, doubt, bound, suppose or retract it."""

from __future__ import annotations

import re

CLAUSE_END = re.compile(
    r"[,;]\s|\.\s|[.!?]$|\s(?:because|since|as|so|which|where|when|after|before|given)\b|(?<=[\w%])\s\("
)
DENIED = re.compile(
    r"(?:\b|(?=n't))(?:wrong|incorrect|false|unknown|undetermined|unsure|maybe|perhaps|possibly|probably|neither"
    r"|(?:i|a|my|just a) guess|impossible|unlikely|doubt(?:ful)?|extraneous|or so"
    r"|(?:is|are|was|were|be|seems?) (?:far |much |way )?too [a-z]+"
    r"|(?:not|n't) (?:right|correct|sure|certain|known?|true|think|believe|the answer)"
    r"|(?:cannot|can't) be (?:right|correct|the answer)|no (?:proof|(?:real )?solutions?)|nobody knows"
    r"|(?:cannot|can't|unable to) (?:be )?(?:determine|say|tell|know))",
    re.IGNORECASE,
)
DOUBTED = re.compile(
    r"(?:\b(?:not|never|cannot|might|could|may|hardly|anything but|unlikely to|supposed to"
    r"|(?:rul(?:e|ed|ing)|cross(?:ed)?) out|(?:exclud|reject|eliminat|discard)(?:e|ed|es|ing|s)?)|n't)"
    r"(?:\s(?:be|have|get|need|make|equal|to|exactly|really|just))*[\s$]*$",
    re.IGNORECASE,
)
BOUNDED = re.compile(
    r"\b(?:(?:more|less|fewer|greater|larger|smaller|higher|lower|bigger) than(?: or equal to)?"
    r"|at (?:least|most)|nearly|almost|near|close to"
    r"|over|under|above|below|up to|between|from|exceeds"
    r"|other than|except|all but|by no means|minus|negative|divisible by"
    r"|(?:square|root|multiple|factor|opposite|inverse) of"
    r"|twice|double|triple|half(?: of)?|(?:third|quarter|fifth|tenth)s? of)\s?[$]?$",
    re.IGNORECASE,
)
REFERENCE = re.compile(
    r"(?<!each )(?<!every )(?<!per )(?<!one )\b(?:pages?|chapter|section|equation|eq\.|figure|table"
    r"|theorem|lemma|option|choice|exercise|problem|question|line|step)\s\(?$",
    re.IGNORECASE,
)
"""Part of a text, before its number: `page 42`."""
_DISOWNED = re.compile(
    r"\b(?:(?:wrong|incorrect|false|previous|first|initial|old|earlier|former|original|example|sample"
    r"|possible|hypothetical|alternative|tempting|common|candidate)"
    r" (?:answer|guess)(?:s|es)?|(?:friend|teacher|student|classmate|(?:text)?book|key)'s? answer"
    r"|answer used to be"
    r"|(?:claim(?:s|ed)|thought|guessed|pretend(?:s|ed)|(?:some|might|may|could) (?:say|think))"
    r" (?:that )?(?:(?:the|my|his|her|their|its) )?(?:answer|result|it))\b"
    r"[^,;:.\n\d]{0,40}[,:]?[\s*_$]*$",
    re.IGNORECASE,
)
"""Owner of an answer, before it: another attempt or another person, or it is called wrong."""
_RETRACTED = re.compile(
    r"[^.,(\n\d]{0,30}(?:\(|(?:, |\.+ |\()"
    r"(?:but|no|wait|however|actually|though|this|that|it"
    r"|which(?= is| was| contradict))\b)[^\n\d]{0,24}?"
    r"\b(?:wrong|incorrect|guess|(?:not|n't) (?:right|correct|sure)|not it|impossible|extraneous"
    r"|scratch that"
    r"|contradicts?|lied|mistaken|(?:(?:is|was)|(?<=')s) (?:a mistake|a lie|an error|false))\b",
    re.IGNORECASE,
)
"""Retraction of a number before it: `42. No, that is wrong.`"""
SUPPOSED = re.compile(
    r"\b(?:(?i:if|whether)\b[^,;:.\n\d]{0,40}\b(?:were|was|had been|is)"
    r"|(?:(?i:suppos|assum)(?:e|ing)|(?i:imagine|let(?:'s (?:say|assume)|\s(?!me|us)[A-Za-z]))|Were)\b"
    r"[^,;:.\n\d]{0,40}|(?i:if)\s[$]?[A-Za-z]\s?(?==))(?:\s|=\s?)[$]?$"
)
_CONDITIONAL = re.compile(r"\bwould\b[^,;.\n\d]{0,24}\s[$]?$", re.IGNORECASE)
_OTHERWISE = re.compile(
    r"[^.\n]{0,60}(?:\.+\s)?\b(?:otherwise\b|correction\b"
    r"|(?:actually|oops|sorry|wait),? (?:no\b|it(?:'s| is))"
    r"|but (?:i|we) (?:get|got|find|found|obtain))",
    re.IGNORECASE,
)
"""Second answer after a number: `42 if it rains, 43 otherwise`, `42? Actually no, 43`."""
_CONDITION = re.compile(r"[^,;.\n\d]{0,24}\s(?:if|unless)\b", re.IGNORECASE)
CORRECTED = re.compile(r"\bnot\b[^.;\n]{1,60}?\bbut(?: rather)?\s", re.IGNORECASE)
CONTRASTED = re.compile(
    r"(\d[^.;\n\d]{0,24}?),?\s\(?(?:(?:(?<=,\s)|(?<=\()|(?:and|but)\s)not|rather than|instead of)\s[$]?"
    r"-?\d+(?:[.,]\d+)*(?:\s?%|\s[A-Za-z]+)?\)?(?=\s*(?:[.!;,)]|$))",
    re.MULTILINE,
)
"""Number after a "not" that follows another one: `42, not 41`."""


def is_disowned(text: str, start: int, end: int) -> bool:
    """Return whether the words before an answer, said from `start` to `end`, deny or suppose it."""
    begin = max(start - 60, 0)
    before = re.split(r"[,;:.\n]", text[begin:start])[-1]
    said = f"{text[begin:end].rstrip()} "
    return any((DENIED.search(before), _DISOWNED.search(said), SUPPOSED.search(said)))


def is_withheld(text: str, start: int, end: int) -> bool:
    """Return whether the words of its clause deny it, doubt it or make it a bound."""
    begin = max(text.rfind(mark, 0, start) for mark in (". ", "; ", "\n", ", ", ": "))
    cut = CLAUSE_END.search(text, end)
    clause = text[begin + 1 : cut.start() if cut else len(text)]
    before = text[max(start - 80, 0) : start]
    if _RETRACTED.match(text, end) or _OTHERWISE.match(text, end):
        return True
    if _CONDITIONAL.search(before) and _CONDITION.match(text, end):
        return True
    return DENIED.search(clause) is not None or any(
        words.search(before) for words in (BOUNDED, DOUBTED, SUPPOSED, REFERENCE, _DISOWNED)
    )
