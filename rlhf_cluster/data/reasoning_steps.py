"""Reasoning steps: segments of a response's text, and the tokens at which they end.

    text    "4 * 3 = 12\n\n12 + 1 = 13<end>"       separator "\n"
    steps   "4 * 3 = 12", "12 + 1 = 13"            segments that are blank are no steps

Promises:
- the tokens are those that were sampled, and their text is that which rewards read: nothing is
  encoded again;
- a step ends at the token that completes the last character of its segment, also where several
  tokens share a character, or two steps a token; what follows the last step (the end token, white
  space) belongs to it, so its end is the last token of the response;
- a response without any text is one step, so that every response has something to be scored;
- a response of T tokens takes T calls of the decoder on a few tokens each. Where their texts do not
  add up to the whole (a decoder that looks back further), prefixes are bisected instead.

Shapes: T response tokens, S steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Decode = Callable[[Sequence[int]], str]
Span = tuple[int, int]

_INCOMPLETE = "\ufffd"  # what decoders give for the bytes of a character that has not ended
_MAX_PENDING = 8  # tokens; a character has at most 4 bytes


def step_spans(text: str, separator: str) -> list[Span]:
    """Where the steps of `text` begin and end, in characters: [S], S at least 1."""
    spans, begin = [], 0
    for segment in text.split(separator):
        if segment.strip():
            spans.append((begin, begin + len(segment)))
        begin += len(segment) + len(separator)
    return spans or [(0, len(text))]


def step_ends(
    decode: Decode, ids: Sequence[int], silent: frozenset[int], text: str, spans: Sequence[Span]
) -> np.ndarray:
    """The index of each step's last token.

    Args:
        decode: from token ids to text, `text` of all of them.
        ids: [T], as sampled, at least one.
        silent: ids that never have a text (special tokens).
        text: of the response.
        spans: [S], as `step_spans` gives them.

    Returns:
        [S] int32, never falling; the last one is T - 1.
    """
    last = len(ids) - 1
    wanted = [end for _, end in spans[:-1]]
    if not wanted:
        return np.array([last], dtype=np.int32)
    spoken = [index for index, token in enumerate(ids) if token not in silent]
    complete = _complete_characters(decode, [ids[index] for index in spoken])
    if complete and complete[-1] == len(text):
        found = [spoken[bisect_left(complete, end)] for end in wanted]
    else:
        found = [_bisected(decode, ids, end) for end in wanted]
    return np.array([*found, last], dtype=np.int32)


def _complete_characters(decode: Decode, ids: Sequence[int]) -> list[int]:
    """How many characters are complete after each token. Decodes a token with those before it that
    began a character, and the piece before them, for decoders that treat a beginning apart."""
    counts: list[int] = []
    before = done = total = 0  # ids[before:done] is the piece before, ids[done:] are pending
    known = 0  # characters of ids[before:done]
    for index in range(len(ids)):
        text = decode(ids[before : index + 1])
        ended = len(text) > known and not text.endswith(_INCOMPLETE)
        if ended or index + 1 - done >= _MAX_PENDING or index + 1 == len(ids):
            total += len(text) - known
            before, done = done, index + 1
            known = len(decode(ids[before:done]))
        counts.append(total)
    return counts


def _bisected(decode: Decode, ids: Sequence[int], end: int) -> int:
    """The first token after which `end` characters are complete, by the texts of prefixes."""

    def complete(index: int) -> int:
        return len(decode(ids[: index + 1]).rstrip(_INCOMPLETE))

    return min(bisect_left(range(len(ids)), end, key=complete), len(ids) - 1)


Reduction = Literal["min", "product", "last", "mean"]


def reduced(scores: np.ndarray, how: Reduction) -> float:
    """One score of a response from its steps' scores [S] in [0, 1], S at least 1."""
    if how == "min":
        return float(scores.min())
    if how == "product":
        return float(scores.prod())
    return float(scores[-1] if how == "last" else scores.mean())
