"""All texts of a row, whatever its layout: what a tokenizer learns from.

Promises: the marks of a dialogue written as one text ("Human:", "Assistant:") are not among them, as a
model never sees them; of a preference's two dialogues the shared turns come once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_cluster.data.dialogue import is_dialogue, parse_dialogue


def texts(columns: Mapping[str, Any]) -> Iterator[str]:
    """Every text in the columns, and in lists of messages there, each once a row."""
    yield from dict.fromkeys(text for value in columns.values() for text in _texts(value) if text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if is_dialogue(value):
            yield from (turn["content"] for turn in parse_dialogue(value, "a row"))
        else:
            yield value
    elif isinstance(value, list):
        for message in value:
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                yield message["content"]
