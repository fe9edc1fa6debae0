r"""Reasoning steps: segments of a response's text, the tokens at which they end, and their labels.

    text    "4 * 3 = 12\n\n12 + 1 = 13<end>"       separator "\n"
    steps   "4 * 3 = 12", "12 + 1 = 13"            blank segments are not steps

The rows of a data file give responses in two layouts:

    listed    prompt, steps, labels       steps: a list of texts; the response is these, with the
                                          separator between them
    split     prompt, completion, labels  completion: a text, cut at the separator

A label is true, false, or a probability in [0, 1] that the step is right, such as the share of
completions from there that reach the right answer. A step without a label has null. There are as many
labels as steps.

Promises of the ends of steps:
- the tokens are the sampled ones and the text is the one that rewards read: nothing is encoded again;
- a step ends at the token that completes the last character of its segment, even if several tokens
  share a character, or two steps share a token;
- text after the last step (the end token, white space) belongs to that step, so its end is the last
  token of the response;
- a response without text is one step, so that every response has a step to score;
- a response of T tokens takes T calls of the decoder on a few tokens each. If their texts do not add
  up to the response's text (a decoder that looks back further), prefixes are bisected instead.

Promises of rows: one that does not fit is refused with file and line. A row without any label raises
`UnusableRow`. No text is changed.

Shapes: T response tokens, S steps.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_cluster.data.dialogues import Messages, parse_messages
from rlhf_cluster.data.preferences import REASONS, UnusableRow
from rlhf_cluster.errors import DataError

Decode = Callable[[Sequence[int]], str]

Span = tuple[int, int]
Reduction = Literal["min", "product", "last", "mean"]

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


def reduce_scores(scores: np.ndarray, how: Reduction) -> float:
    """Reduce the scores of a response's steps, [S] in [0, 1] with S at least 1, to one score."""
    if how == "min":
        return float(scores.min())
    if how == "product":
        return float(scores.prod())
    return float(scores[-1] if how == "last" else scores.mean())


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledSteps:
    """A response and the labels of its steps."""

    prompt: str | Messages
    completion: str
    labels: tuple[float | None, ...]  # one per step, at least one of them a number


def parse_steps(columns: Mapping[str, Any], where: str, separator: str) -> LabelledSteps:
    """Parse a row in either layout. Raises `DataError`, `UnusableRow`."""
    missing = [name for name in ("prompt", "labels") if columns.get(name) is None]
    texts = [name for name in ("steps", "completion") if columns.get(name) is not None]
    if missing or len(texts) != 1:
        found = ", ".join(repr(name) for name, value in columns.items() if value is not None)
        raise DataError(
            f"{where}: expected the columns prompt, labels, and steps or completion; found {found}. "
            "Name them with the source's columns"
        )
    prompt = columns["prompt"]
    if not isinstance(prompt, str) or not prompt:
        prompt = parse_messages(prompt, f"{where}, column 'prompt'")
    if texts == ["steps"]:
        completion = _join(columns["steps"], f"{where}, column 'steps'", separator)
    else:
        completion = columns["completion"]
        if not isinstance(completion, str):
            raise DataError(
                f"{where}, column 'completion': found {type(completion).__name__}, expected text. "
                "Correct the row"
            )
    if not completion.strip():
        raise UnusableRow(f"{where}: {REASONS['empty']}. Correct or remove the row")
    labels = _labels(columns["labels"], f"{where}, column 'labels'")
    if len(labels) != (num_steps := len(step_spans(completion, separator))):
        raise DataError(
            f"{where}: {len(labels)} labels and {num_steps} steps, with the separator {separator!r}. "
            "Give one label per step, null where there is none, or set stage.step_separator"
        )
    if all(label is None for label in labels):
        raise UnusableRow(f"{where}: {REASONS['unlabelled']}. Correct or remove the row")
    return LabelledSteps(prompt=prompt, completion=completion, labels=labels)


def _join(steps: Any, where: str, separator: str) -> str:
    if not isinstance(steps, list) or not steps:
        raise DataError(f"{where}: found {steps!r:.60}, expected a list of texts. Correct the row")
    for number, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip() or separator in step:
            raise DataError(
                f"{where}: step {number} is {step!r:.60}, expected a text that is not blank and does "
                f"not hold the separator {separator!r}. Correct it, or set stage.step_separator"
            )
    return separator.join(steps)


def _labels(values: Any, where: str) -> tuple[float | None, ...]:
    if not isinstance(values, list):
        raise DataError(
            f"{where}: found {values!r:.60}, expected a list of labels. Correct the row"
        )
    for number, value in enumerate(values):
        is_label = isinstance(value, bool | int | float) and 0 <= value <= 1
        if value is not None and not is_label:
            raise DataError(
                f"{where}: label {number} is {value!r:.60}, expected true, false, a number from 0 to "
                "1, or null. Correct it"
            )
    return tuple(None if value is None else float(value) for value in values)
