"""Blocks between ``` fences of a completion, with the language that they name."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Collection, Iterator

_FENCE = re.compile(r"^([ \t]*)```([^\n`]*)$", re.MULTILINE)
_NAME = re.compile(r"[^\w+#]*([\w+#]*)")


def last_block(text: str, languages: Collection[str], may_be_open: bool) -> str | None:
    """The last block of one of these languages, else the last that names none, else None."""
    untagged = None
    for language, content in reversed(list(blocks(text, may_be_open))):
        if language in languages:
            return content
        if not language and untagged is None:
            untagged = content
    return untagged


def blocks(text: str, may_be_open: bool) -> Iterator[tuple[str, str]]:
    """Language (lower case, empty without one) and content of each block, in order.

    Fences of a list's entry are indented, and so is what they hold: that is taken off.
    """
    language, begin = "", -1
    for fence in _FENCE.finditer(text):
        if begin < 0:
            name = _NAME.match(fence[2].strip())
            language, begin = name[1].lower() if name else "", fence.end() + 1
        elif not fence[2].strip():
            yield language, _content(text[begin : fence.start()])
            begin = -1
    if begin >= 0 and may_be_open:
        yield language, _content(text[begin:])


def _content(text: str) -> str:
    return textwrap.dedent(text) if text[:1] in " \t" else text
