r"""Dialogues written as one text, as in hh-rlhf: "\n\nHuman: ...\n\nAssistant: ...", to messages.

Promises: no character of a turn is dropped except white space at its ends. Text before the first mark,
and a text without any mark, is refused.
"""

from __future__ import annotations

import re
from typing import Any

from rlhf_cluster.errors import DataError

Messages = list[dict[str, str]]

ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}
_MARK = re.compile(r"(?:^|\n\n)(Human|Assistant|System):")


def is_dialogue(text: str) -> bool:
    """Whether the text begins with the mark of a turn."""
    return _MARK.match(text.lstrip("\n")) is not None


def parse_dialogue(text: str, where: str) -> Messages:
    """Return the turns in order. Raises `DataError` with `where` if the text is not a dialogue."""
    parts = _MARK.split("\n\n" + text.lstrip("\n"))
    before, turns = parts[0], parts[1:]
    if before.strip() or not turns:
        shown = (before or text).strip()[:40]
        raise DataError(
            f"{where}: found {shown!r}, expected a dialogue that begins with 'Human:' or 'Assistant:'. "
            "Correct the row, or give prompt, chosen and rejected as columns"
        )
    return [
        {"role": ROLES[role], "content": content.strip()}
        for role, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def parse_messages(value: Any, where: str) -> Messages:
    """Return role and content of each message. Raises `DataError` with `where` for other values."""
    whole = isinstance(value, list) and all(
        isinstance(m, dict) and all(isinstance(m.get(key), str) for key in ("role", "content"))
        for m in value
    )
    if not whole or not value:
        shown = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
        raise DataError(
            f"{where}: found {type(value).__name__} {shown}, expected text or a list of "
            "{role, content} messages. Correct the row"
        )
    return [{"role": m["role"], "content": m["content"]} for m in value]


def drop_answer(value: Any, where: str) -> Messages:
    """Return the turns of a dialogue (text or messages) before the assistant's final answer.

    Raises `DataError` with `where` if the dialogue has no final answer, or no turn before it.
    """
    parse = parse_dialogue if isinstance(value, str) else parse_messages
    turns = parse(value, where)
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise DataError(
            f"{where}: data.drop_answer takes a dialogue of at least two turns whose last is the "
            f"assistant's, found {repr(value)[:60]}. Correct the row, or set drop_answer = false"
        )
    return turns[:-1]
