"""Reasoning steps: segments of a response's text, and the tokens at which they end.

    text    "4 * 3 = 12\n\n12 + 1 = 13<end>"       separator "\n"
    steps   "4 * 3 = 12", "12 + 1 = 13"            blank segments are not steps

Promises:
- the tokens are the sampled ones and the text is the one that rewards read: nothing is encoded again;
- a step ends at the token that completes the last character of its segment, even if several tokens
  share a character, or two steps share a token;
- text after the last step (the end token, white space) belongs to that step, so its end is the last
  token of the response;
- a response without text is one step, so that every response has a step to score;
- a response of T tokens takes T calls of the decoder on a few tokens each. If their texts do not add
  up to the response's text (a decoder that looks back further), prefixes are bisected instead.

Shapes: T response tokens, S steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

Decode = Callable[[Sequence[int]], str]
Span = tuple[int, int]

_INCOMPLETE = "\ufffd"  # decoders return it for the bytes of an incomplete character
_MAX_PENDING = 8  # tokens; a character has at most 4 bytes


def step_spans(text: str, separator: str) -> list[Span]:
    """Return begin and end of each step of `text`, in characters: [S], S at least 1."""
    spans, begin = [], 0
    for segment in text.split(separator):
        if segment.strip():
            spans.append((begin, begin + len(segment)))
        begin += len(segment) + len(separator)
    return spans or [(0, len(text))]


def step_ends(
    decode: Decode, ids: Sequence[int], silent: frozenset[int], text: str, spans: Sequence[Span]
) -> np.ndarray:
    """Return the index of each step's last token.

    Args:
        decode: function from token ids to text. For all of `ids` it returns `text`.
        ids: [T], as sampled, at least one.
        silent: ids that never have a text (special tokens).
        text: the response's text.
        spans: [S], the result of `step_spans`.

    Returns:
        [S] int32, non-decreasing; the last one is T - 1.
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
        found = [_bisect(decode, ids, end) for end in wanted]
    return np.array([*found, last], dtype=np.int32)


def _complete_characters(decode: Decode, ids: Sequence[int]) -> list[int]:
    """Return how many characters are complete after each token.

    Decodes each token together with the pending tokens of the same character, and with the piece
    before them, for decoders that treat the beginning of a text differently.
    """
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


def _bisect(decode: Decode, ids: Sequence[int], end: int) -> int:
    """Return the first token after which `end` characters are complete, by decoding prefixes."""

    def complete(index: int) -> int:
        return len(decode(ids[: index + 1]).rstrip(_INCOMPLETE))

    return min(bisect_left(range(len(ids)), end, key=complete), len(ids) - 1)


Reduction = Literal["min", "product", "last", "mean"]


def reduce_scores(scores: np.ndarray, how: Reduction) -> float:
    """Reduce the scores of a response's steps, [S] in [0, 1] with S at least 1, to one score."""
    if how == "min":
        return float(scores.min())
    if how == "product":
        return float(scores.prod())
    return float(scores[-1] if how == "last" else scores.mean())
