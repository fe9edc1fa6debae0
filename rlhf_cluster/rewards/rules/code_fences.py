"""Blocks of a completion between fences (``` or ~~~, three or more), with the language they name."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Collection, Iterator

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n`]*)$", re.MULTILINE)
_NAME = re.compile(r"[^\w+#]*([\w+#]*)")


def last_block(
    text: str,
    languages: Collection[str],
    may_be_open: bool,
    rank: Callable[[str], int] = lambda content: 0,
) -> str | None:
    """The last block of the highest `rank`, of one of these languages before those that name none."""
    found = [
        (rank(content), language in languages, number, content)
        for number, (language, content) in enumerate(blocks(text, may_be_open))
        if language in languages or not language
    ]
    return max(found)[-1] if found else None


def blocks(text: str, may_be_open: bool) -> Iterator[tuple[str, str]]:
    """Language (lower case, empty without one) and content of each block, in order.

    A block ends at a fence of the same sign that is as long as its first one. Fences of a list's entry
    are indented like their content: the indentation is removed.
    """
    language, opening, begin = "", "", -1
    for fence in _FENCE.finditer(text):
        if begin < 0:
            name = _NAME.match(fence[2].strip())
            language, begin = name[1].lower() if name else "", fence.end() + 1
            opening = fence[1]
        elif fence[1].startswith(opening) and not fence[2].strip():
            yield language, _content(text[begin : fence.start()])
            begin = -1
    if begin >= 0 and may_be_open:
        yield language, _content(text[begin:])


def _content(text: str) -> str:
    return textwrap.dedent(text) if text[:1] in " \t" else text
