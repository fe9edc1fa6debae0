r"""1.0 when the completion chooses the expected letter, 0.0 otherwise.

Reasoning is removed. The choice is then the first of these that the completion has;
nothing else is a choice:

1. in its last `\boxed{}` or between `<answer>` tags, else after `####` on its last line: a letter,
   alone or before what it stands for ("B) Paris");
2. the last "answer is X" or "answer: X" (also "answer is option X", "correct option is X", "option X
   is correct", "X is the correct answer", `"answer": "X"`, and in Chinese), where no words of a
   sentence follow ("The answer is A great deal");
3. its last line that is a letter alone ("Hence (B)." is one), or that begins with a letter in
   parentheses or asterisks, or before a closing parenthesis or full stop ("C) because"), where no
   other line begins so.

A letter may be in parentheses, brackets, asterisks, dollar signs and `\text{}`, `\textbf{}` and
the like, and before a full stop, colon or closing parenthesis; it is one of `choices`, of either case
where it is alone or in parentheses. Two letters ("A or maybe B") choose nothing; of "not A but B"
it is B.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rlhf_cluster.records import Prompt, Rollout
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import RewardFailure, column
from rlhf_cluster.rewards.rules.final_answer import final_statement
from rlhf_cluster.rewards.rules.reasoning import ReasoningSection, without_reasoning
from rlhf_cluster.rewards.rules.withheld import is_disowned

_OPEN = r"[(\[{*_\s$`\"']{0,8}"
_CLOSE = r"[)\]}*_\s$`\"'.:,]{0,8}"
_END = r"(?!\w|['\u2019]\w)"
_WRAP = r"(?:\\(?:text[a-z]*|math(?:rm|bf|it|sf)|mbox|boldsymbol)\s?\{)?"
_LETTER = re.compile(rf"{_OPEN}{_WRAP}{_OPEN}{_WRAP}{_OPEN}([A-Za-z]){_CLOSE}")
_OPTION = re.compile(
    rf"{_OPEN}{_WRAP}{_OPEN}(?i:(?:option|choice|answer)\s?:?\s?)?[(\[*]{{0,3}}([A-Za-z])(?:[)\].:}}*]|\\)+"
    rf"(?:\s.*)?",
    re.DOTALL,
)
_SAID = re.compile(
    rf"(?:\b(?i:answer|option|choice)\b|\u7b54\u6848)(?:[ ](?i:to|for|of)\b[^\n.,;:?!]{{0,80}}?)?"
    r"[*_\"']{0,3}\s{0,4}(?i:is|:|=|\u662f|\u4e3a|\u70ba|would be|should be)[:\s*_]{0,6}"
    rf"(?i:not\s+{_OPEN}[A-Z]{_CLOSE}(?:but\s+))?"
    rf"(?i:(?:clearly|therefore|thus|indeed|the|letter|option|choice)\s+){{0,3}}"
    rf"{_OPEN}{_WRAP}{_OPEN}(?P<said>[A-Za-z]){_END}"
    rf"|(?<![Ii]f )(?<!hether )\b(?i:option|choice|answer|letter)[ ]{_OPEN}(?P<named>[A-Z]){_END}"
    rf"{_CLOSE}(?i:is|must be|would be)[ ](?i:the[ ])?(?i:correct|right|best|true|answer)\b"
    rf"|(?<!\w)(?P<first>[A-Z]){_CLOSE}"
    r"(?i:is[ ]the[ ](?:correct|right|best)[ ](?:answer|option|choice))\b"
    rf"|[\u9009\u9078](?:\u62e9|\u64c7|\u9879|\u9805)?[:\s]?{_OPEN}(?P<chosen>[A-Z])(?![A-Za-z])"
)
_AFTER = re.compile(r"[^\n]{0,80}")
_NOT_BUT = re.compile(
    rf"\bnot\s{_OPEN}[A-Z]{_CLOSE}but\s(?:rather\s)?{_OPEN}([A-Z]){_END}", re.IGNORECASE
)
_OFFERED = re.compile(
    rf"{_CLOSE}\(?(?:or|and|/|,|&)\s*(?:(?:maybe|perhaps|possibly|even)\s+)?"
    rf"(?:(?:option|choice)\s+)?{_OPEN}[A-Z]{_END}"
)
_LEAD = re.compile(
    r"(?i:(?:hence|therefore|thus|so|finally|i (?:choose|pick|select|go with)|it is|it's)[,:]?\s)"
    r"(?i:(?:the\s)?(?:option|choice|answer)\s)?(?=\W*[A-Z]\W*$)"
)
_GOES_ON = re.compile(
    r"\s+(?!(?:because|since|as|for|and|but|which|where|with|in|is|not|I|by|due|if|so|that)\b)\w"
)
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_MAX_LINE = 400


class MultipleChoiceConfig(ReasoningSection):
    """The completion chooses the letter of a column."""

    type: Literal["multiple_choice"] = "multiple_choice"
    target_column: str = "answer"
    """Column with the right choice: its letter, or its number counted from 0."""
    choices: str = Field(default="ABCD", pattern=r"^[A-Z]{2,26}$")
    """The letters, in the order of their numbers."""


class MultipleChoice:
    def __init__(self, config: MultipleChoiceConfig, context: RewardContext) -> None:
        self._config = config

    def score(
        self, prompt: Prompt, rollouts: Sequence[Rollout], completions: Sequence[str]
    ) -> list[float]:
        """1.0 or 0.0 per rollout. Raises `RewardFailure` without a usable target."""
        expected = self._read_target(prompt)
        texts = self._config.without_reasoning(completions)
        found = [choice(text, self._config.choices) for text in texts]
        return [1.0 if letter == expected else 0.0 for letter in found]

    def close(self) -> None:
        """Nothing to release."""

    def _read_target(self, prompt: Prompt) -> str:
        target: Any = column(prompt, self._config.target_column)
        letters = self._config.choices
        if isinstance(target, int) and not isinstance(target, bool) and 0 <= target < len(letters):
            return letters[target]
        match = _LETTER.fullmatch(target) if isinstance(target, str) else None
        if match is None or match[1].upper() not in letters:
            raise RewardFailure(
                f"prompt {prompt.prompt_id}, column {self._config.target_column!r}: found "
                f"{target!r:.60}, expected one of {letters} or a number from 0 to "
                f"{len(letters) - 1}. Correct the row, or set choices",
                "column",
            )
        return match[1].upper()


def choice(text: str, choices: str) -> str | None:
    """The letter that `text` chooses by the rules above, None when it chooses none."""
    statement = final_statement(text)
    if statement.kind in ("box", "tag", "hash"):
        return _read_mark(statement.text, choices)
    text = (
        without_reasoning(text).translate(_FULL_WIDTH)
        if not text.isascii()
        else without_reasoning(text)
    )
    for found in reversed(list(_SAID.finditer(text))):
        if is_disowned(text, found.start(), found.start(found.lastgroup or "said")):
            continue
        letter, is_one = _read_words(text, found, choices)
        if is_one:
            return letter
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for line in reversed(lines):
        letter = _letter(line, choices)
        if letter is not None:
            return letter
    corrected = _NOT_BUT.search(lines[-1][:_MAX_LINE]) if lines else None
    if corrected is not None and corrected[1].upper() in choices:
        return corrected[1].upper()
    begun = {
        line: found[1].upper() for line in lines if (found := _OPTION.fullmatch(line[:_MAX_LINE]))
    }
    letters = {letter for letter in begun.values() if letter in choices}
    return letters.pop() if len(letters) == 1 and len(begun) == 1 else None


def _read_words(text: str, found: re.Match[str], choices: str) -> tuple[str | None, bool]:
    """The letter that words choose, none where they offer two; and whether it is a choice."""
    group = found.lastgroup or "said"
    start, end = found.span(group)
    after = _AFTER.match(text, end)
    rest = after[0] if after else ""
    if not _is_choice(found[group], rest, text[max(start - 1, 0) : start], choices):
        return None, False
    return None if _OFFERED.match(rest) else found[group].upper(), True


def _is_choice(letter: str, after: str, before: str, choices: str) -> bool:
    """Whether a letter of a sentence is meant as one: "A great deal" and "a." are words."""
    if letter.upper() not in choices:
        return False
    enclosed = before in tuple("([{*$`\"'") or after[:1] in tuple(")]}*`\"'")
    if letter.islower():
        return enclosed
    return enclosed or letter not in "AI" or not _GOES_ON.match(after)


def _read_mark(statement: str, choices: str) -> str | None:
    line = statement.strip().translate(_FULL_WIDTH)[:_MAX_LINE]
    found = _letter(line, choices)
    if found is not None:
        return found
    corrected = _NOT_BUT.search(line)
    if corrected is not None:
        return corrected[1].upper() if corrected[1].upper() in choices else None
    said = _SAID.search(line)
    letter, is_one = _read_words(line, said, choices) if said is not None else (None, False)
    if is_one:
        return letter
    option = _OPTION.fullmatch(line)
    if option is None or option[1].upper() not in choices:
        return None
    return None if _OFFERED.match(line[option.end(1) :]) else option[1].upper()


def _letter(line: str, choices: str) -> str | None:
    match = _LETTER.fullmatch(_LEAD.sub("", line, count=1)) if len(line) < 64 else None
    return match[1].upper() if match and match[1].upper() in choices else None
