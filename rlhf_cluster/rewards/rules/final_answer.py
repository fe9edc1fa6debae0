r"""Finds where a text states its final answer. What the answer is worth, the verifiers decide.

First `reasoning.py` removes the reasoning of a completion. Then the first of these is the statement:

1. `box`: the content of the last `\boxed{}` that is not empty (`\fbox{}` is one). Boxes with nothing
   but a comma, "and" or "or" between them are one statement, joined by commas.
2. `tag`: one line between the last `<answer>` and `</answer>`; with more lines, the rules below
   read those lines only.
3. `hash`: what follows `####` on the last line that is not empty. Elsewhere `####` is a heading.
4. `said`: what follows the last "answer is", "answer:" or heading "Answer", up to the end of the
   line, where that has a value; what is denied or doubted ("cannot be 6") keeps those words.
5. `prose`: all of the text, where nothing marks an answer.

A target is read by the rules of the data sets instead: the line after its last `####` (GSM8K), else
its last box (MATH), else none.

Reading takes time linear in the text.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from rlhf_cluster.rewards.rules.reasoning import without_reasoning
from rlhf_cluster.rewards.rules.withheld import is_disowned

Kind = Literal["box", "tag", "hash", "said", "prose"]

MAX_STATEMENT_CHARACTERS = 400
"""More of a line is not read: no final answer is so long."""

_MAX_JOINED = 8
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])[ ]{0,4}")
_MARKUP = re.compile(
    r"~~[^~\n]{1,80}~~|</?(?:b|i|u|p|em|strong|code|center|span|div|final|final_answer"
    r"|result|output|solution|mark|kbd|br)(?: [^<>\n]{0,80})?/?>"
    r"|</s>|<(?:eos|end_of_turn|\|[A-Za-z_]{1,20}\|)>|(?<=\s)[:;]-?[)D](?!\S)"
)
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_BARE = re.compile(r"[^\s${}]{1,64}")
JOINT = re.compile(
    r"(?:[\s$,;&*]|\\[()\[\],; ]|\\quad|\\text\s?\{\s?(?:and|or)\s?\}|\b(?:and|or)\b){0,12}"
)
FORMULA = re.compile(
    r"\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\]|\$\$(.{1,400}?)\$\$"
    r"|(?<!\\)\$(?! )([^$\n]{1,400}?)(?<![\\ ])\$(?!\d)",
    re.DOTALL,
)
"""A formula among words; one of its groups has the content."""
_ANSWER = re.compile(
    r"(?i:(?<![A-Za-z])(?:answer|answers(?=:| are\b)|solutions(?= are\b)|solution set(?= is\b)))\b"
    r"|\u7b54\u6848"
)
_UNFINISHED = re.compile(
    r"\b(?:convert|round|write|express|put|double|multiply|divide|subtract"
    r"|(?:to|can|must|should) (?:find|get|calculate|determine|check))\b[^,;:.\n]*$",
    re.IGNORECASE,
)
"""Work on the answer, before the word "answer": `round the answer to 3 digits`."""
_IF = r"[^.\n]{0,80}\b(?:if|unless)\b"
_SAYS = re.compile(
    # "answer:", "answer (in cm):", "the answer to this question is", a heading; but not "write the
    # answer as a percentage: 5" and "multiply the answer by 3, which is 5".
    r"[ *_`\"]{0,4}(?:\([^()\n]{1,40}\)[ *_]{0,4})?"
    r"(?:[-=]>|[:=|\uff1a\u662f\u4e3a\u2192]|\s[\u2013\u2014-]\s)"
    r"|(?:[ *_]{1,4}(?:to|of|for|in|as|you)\b[^\n.,;?!:=\uff1a]{0,80}?)?"
    r"(?:[ *_]{1,4}|, (?:then|therefore|thus|hence), )"
    rf"(?:then |therefore |thus |now |should |must |will |would (?!{_IF})){{0,2}}"
    r"(?=(?P<doubt>cannot |can't |can not |might |could |may |isn't |never |would )?)"
    r"(?:cannot |can't |can not |might |could |may |would )?(?:isn't|is|are|be|was|equals|IS|Is"
    r"|(?:comes|works|turns) (?:out )?to(?: be)?)\b"
    r"|[ *_]{1,4}#?\d{1,2}[ *_]{0,4}:|(?: of)?[ *_]{1,4}(?=\$?\d)"
    r"|[ *_]{1,4}(?:to|for|of) (?:the )?(?:problem|question|part|exercise)\b[^\n.,;?!:=\uff1a]{0,24}:"
    r"|[ *_#]{0,8}\n"
)
_QUOTED_END = re.compile(r"\"[\s,}\]]*$")
_SENTENCE = re.compile(r"(?:[A-Za-z]+\W+){4}|\d ?[-+*/x\u00d7] ?\$?\d[^=\n]*=")
_SOLUTION = re.compile(
    r"\n(?!\W*(?i:explanation|because|reason|since|check|proof|work|note))[^\n]*\d"
)
_ONLY_ITEM = re.compile(r"(?:\(1\)|1[.)])\s+(?=[^\w\n]*\d[\d.,/]*(?: ?[A-Za-z%]+){0,2}[^\w\n]*$)")
"""Marker of a list before its one value: `1. 42`."""
_SECOND_ITEM = re.compile(r"^\W*2[.)]", re.MULTILINE)
_FILLED_IN = re.compile(r"[\[<]([^\[\]<>,;\n]{1,40})[\]>]\W*")
"""Value in the brackets of a form: `[42]`."""
_VALUE = re.compile(r"[\d\\$\u00bc-\u00be\u2150-\u215e]")


class Statement(NamedTuple):
    """Part of a text that states its answer, and the rule that found it."""

    text: str
    kind: Kind


def final_statement(completion: str) -> Statement:
    """The statement of a completion by the rules above."""
    text = _MARKUP.sub("", without_reasoning(completion))
    content = last_box(text)
    if content is not None:
        return Statement(content, "box")
    tagged = _last_tag(text)
    if tagged is not None:
        if len(tagged.splitlines()) == 1:
            return Statement(_cut(tagged), "tag")
        text = tagged
    lines = text.rstrip().rpartition("\n")
    _, marker, after = lines[2].rpartition("####")
    if marker and after.strip():
        return Statement(_cut(after), "hash")
    said = _last_said(text)
    return Statement(said, "said") if said is not None else Statement(text, "prose")


def target_statement(target: str) -> Statement | None:
    """The statement of a row's target by the rules of the data sets, None where none is marked."""
    _, marker, after = target.rpartition("####")
    if marker:
        lines = after.strip().splitlines()
        return Statement(lines[0].strip() if lines else "", "hash")
    content = last_box(target)
    return Statement(content, "box") if content is not None else None


def last_box(text: str) -> str | None:
    """The content of the last box, joined with boxes that belong to it; None without a box."""
    found = list(_BOX.finditer(text)) if "box" in text else []
    joined: list[str] = []
    begin = len(text)
    for box in reversed(found):
        end, content = _content(text, box.end(), begin)
        if joined:
            apart = text[end : min(begin, end + 60)] if end <= begin else "x"
            if begin - end > 60 or not JOINT.fullmatch(apart) or len(joined) == _MAX_JOINED:
                break
        if content:
            joined.append(content)
            begin = box.start()
    distinct = list(dict.fromkeys(reversed(joined)))
    return ", ".join(distinct) if distinct else None


def _content(text: str, start: int, stop: int) -> tuple[int, str]:
    """End and content of the box that begins at `start`; an open one goes to the end of its line."""
    if text[start : start + 1] != "{":
        bare = _BARE.match(text, start)
        return (bare.end(), bare[0]) if bare else (start, "")
    depth = 0
    # Boxes inside another box are found first, so nothing after `stop` is read twice.
    for brace in _BRACE.finditer(text, start, stop):
        depth += (brace[0] == "{") - (brace[0] == "}")
        if depth == 0:
            return brace.end(), text[start + 1 : brace.start()].strip()
    line = text[start + 1 : stop].partition("\n")[0]
    return stop, line.strip()


def _last_tag(text: str) -> str | None:
    _, marker, after = text.rpartition("<answer>")
    if not marker:
        return None
    return after.partition("</answer>")[0].strip() or None


def _last_said(text: str) -> str | None:
    for found in reversed(list(_ANSWER.finditer(text))):
        says = _SAYS.match(text, found.end())
        if says is None or is_disowned(text, found.start(), says.end()):
            continue
        if _UNFINISHED.search(text, max(found.start() - 60, 0), found.start()):
            continue
        rest = text[says.end() : says.end() + MAX_STATEMENT_CHARACTERS].lstrip(
            ' *_`":=\uff1a\u2014'
        )
        line, _, below = rest.partition("\n")
        if not line.strip(" *_.:$\\[(") or line.rstrip(" *_").endswith((":", "\uff1a")):
            line = _first_line(below)
        if says[0].endswith("|"):  # a row of a table
            line = line.partition("|")[0]
        if says[0].rstrip(" *_").endswith((":", "\n")) and _begins_solution(line, rest):
            return None
        if _VALUE.search(line):
            if not _SECOND_ITEM.search(below):
                line = _ONLY_ITEM.sub("", line, count=1)
            filled_in = _FILLED_IN.fullmatch(line)
            line = filled_in[1] if filled_in else line
            return (says["doubt"] or "") + _QUOTED_END.sub("", line).strip(" |")
    return None


def _begins_solution(line: str, rest: str) -> bool:
    """Whether "Answer:" begins a solution of several lines, of which this is a sentence."""
    if _SENTENCE.search(line) is None:
        return False
    return _SOLUTION.match(rest.partition(line)[2]) is not None


def _first_line(text: str) -> str:
    """The first line that is more than the opening of a formula."""
    for line in text.splitlines():
        if line.strip(" *_\\[$`->"):
            return line.strip(" >").removeprefix("- ")
    return ""


def _cut(text: str) -> str:
    return text.strip()[:MAX_STATEMENT_CHARACTERS]
