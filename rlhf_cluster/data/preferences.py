"""Preferences from the rows of a data file: pairs, rankings, and single responses with a verdict.

A row's layout is recognised by its columns:

    pair       prompt, chosen, rejected      prompt: text or messages; responses: text, or messages
                                             that continue the prompt or repeat it first
    dialogue   chosen, rejected              whole dialogues that differ in the last answer alone:
                                             messages, or text as in hh-rlhf, each turn after an empty
                                             line and "Human:" or "Assistant:"
    ranking    prompt, ranking               a list of at least two responses, the best first
    labelled   prompt, completion, label     label: true or false (KTO)
    graded     prompt, completion, ...       a number in each of the columns asked for, null for none

A pair may have a `margin` (how much better the chosen response is), and paraphrases of its responses in
`chosen_paraphrase` and `rejected_paraphrase`. Other columns are ignored.

Promises:
- a row that has no layout, or that does not fit its layout, is refused with file and line;
- a row that fits its layout but has nothing to learn (`REASONS`) raises `UnusableRow`, so that the
  reader of the file can refuse it too, or skip it and count it by its reason;
- texts are not changed, except that white space at the ends of a dialogue's turns is removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_cluster.data.dialogues import Messages, is_dialogue, parse_dialogue, parse_messages
from rlhf_cluster.errors import DataError

Layout = Literal["pair", "dialogue", "ranking", "labelled"]

LAYOUTS: Mapping[Layout, tuple[str, ...]] = {
    "pair": ("prompt", "chosen", "rejected"),
    "ranking": ("prompt", "ranking"),
    "labelled": ("prompt", "completion", "label"),
    "dialogue": ("chosen", "rejected"),
}
# reasons of `UnusableRow`, with the text of the message
REASONS = {
    "equal": "two of the responses are the same",
    "empty": "a response has no text",
    "history": "chosen and rejected differ before the last answer",
    "unlabelled": "nothing of the response has a label",
}


class UnusableRow(DataError):
    """A row that fits its layout but has nothing to learn. `reason` is a key of `REASONS`."""

    @property
    def reason(self) -> str:
        return next(key for key, text in REASONS.items() if text in str(self))


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two responses to one prompt, the better one first."""

    prompt: str | Messages
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """Responses to one prompt, the best first."""

    prompt: str | Messages
    responses: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelledResponse:
    """One response and whether it is wanted."""

    prompt: str | Messages
    completion: str
    desirable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GradedResponse:
    """One response and its grades; None for a missing grade."""

    prompt: str | Messages
    completion: str
    grades: tuple[float | None, ...]


def recognise(columns: Mapping[str, Any], where: str) -> Layout:
    """Return the layout of a row. Raises `DataError`, starting with `where`, if it has none."""
    for layout, names in LAYOUTS.items():
        if all(columns.get(name) is not None for name in names):
            return layout
    known = "; ".join(f"{', '.join(names)} ({layout})" for layout, names in LAYOUTS.items())
    found = ", ".join(repr(name) for name, value in columns.items() if value is not None)
    raise DataError(
        f"{where}: the columns {found} match no layout of preferences. Expected {known}. Rename them"
    )


def parse_pair(columns: Mapping[str, Any], where: str) -> Pair:
    """Parse a row in the layout `pair` or `dialogue`. Raises `DataError`, `UnusableRow`."""
    layout = recognise(columns, where)
    if layout in ("labelled", "ranking"):
        found, other = ("a single response with a label", "kto")
        if layout == "ranking":
            found, other = ("a ranking", "plackett_luce")
        raise DataError(
            f"{where}: {found}, and pairs are needed. Give prompt, chosen and rejected, or take the "
            f"loss {other!r}"
        )
    parse = _from_pair if layout == "pair" else _from_dialogues
    prompt, chosen, rejected = parse(columns, where)
    if chosen == rejected:
        raise _unusable("equal", where)
    if not chosen.strip() or not rejected.strip():
        raise _unusable("empty", where)
    return Pair(
        prompt=prompt, chosen=chosen, rejected=rejected, margin=_number(columns, "margin", where)
    )


def parse_paraphrases(columns: Mapping[str, Any], pair: Pair, where: str) -> tuple[str, str] | None:
    """Return chosen and rejected of a row's `pair`, replaced by paraphrases where the row has them.

    None if the row has no paraphrase that differs. Raises `DataError`.
    """
    found = []
    for name, own in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        column = f"{name}_paraphrase"
        value = columns.get(column)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise DataError(
                f"{where}, column {column!r}: found {_describe(value)}, expected the response's text "
                "in other words. Correct it"
            )
        found.append(own if value is None else value)
    return (found[0], found[1]) if tuple(found) != (pair.chosen, pair.rejected) else None


def parse_ranking(columns: Mapping[str, Any], where: str) -> Ranking:
    """Parse a row in the layout `ranking`, or a pair. Raises `DataError`, `UnusableRow`."""
    if recognise(columns, where) != "ranking":
        pair = parse_pair(columns, where)
        return Ranking(prompt=pair.prompt, responses=(pair.chosen, pair.rejected))
    prompt, listed = _prompt(columns["prompt"], where), columns["ranking"]
    if not isinstance(listed, list) or len(listed) < 2:
        raise DataError(
            f"{where}, column 'ranking': found {_describe(listed)}, expected a list of at least two "
            "responses, the best first. Correct the row"
        )
    place = f"{where}, column 'ranking'"
    responses = tuple(_response(value, prompt, place) for value in listed)
    if len(set(responses)) < len(responses):
        raise _unusable("equal", where)
    if not all(text.strip() for text in responses):
        raise _unusable("empty", where)
    return Ranking(prompt=prompt, responses=responses)


def parse_labelled(columns: Mapping[str, Any], where: str) -> list[LabelledResponse]:
    """Parse a row in the layout `labelled` to one response, or a pair to two.

    Raises `DataError`, `UnusableRow`.
    """
    if recognise(columns, where) != "labelled":
        pair = parse_pair(columns, where)
        return [
            LabelledResponse(prompt=pair.prompt, completion=text, desirable=desirable)
            for text, desirable in ((pair.chosen, True), (pair.rejected, False))
        ]
    prompt = _prompt(columns["prompt"], where)
    completion = _response(columns["completion"], prompt, f"{where}, column 'completion'")
    label = columns["label"]
    if not isinstance(label, bool) and label not in (0, 1):
        raise DataError(
            f"{where}, column 'label': found {_describe(label)}, expected true or false. Correct it"
        )
    if not completion.strip():
        raise _unusable("empty", where)
    return [LabelledResponse(prompt=prompt, completion=completion, desirable=bool(label))]


def parse_graded(columns: Mapping[str, Any], where: str, names: Sequence[str]) -> GradedResponse:
    """Parse a row of prompt, completion, and a grade in each of the columns `names`.

    Raises `DataError`, `UnusableRow`.
    """
    missing = [name for name in ("prompt", "completion") if columns.get(name) is None]
    missing += [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"{where}: no column {missing[0]!r}; expected prompt, completion, {', '.join(names)}. Name "
            "them with the source's columns"
        )
    prompt = _prompt(columns["prompt"], where)
    completion = _response(columns["completion"], prompt, f"{where}, column 'completion'")
    grades = tuple(_number(columns, name, where) for name in names)
    if not completion.strip():
        raise _unusable("empty", where)
    if all(grade is None for grade in grades):
        raise _unusable("unlabelled", where)
    return GradedResponse(prompt=prompt, completion=completion, grades=grades)


def split_key(prompt: str | Messages) -> str:
    """Return the text that decides on which side of a held-out split a row is.

    It is the prompt's text, or its first user turn. So a dialogue and its continuation are on the same
    side.
    """
    if isinstance(prompt, str):
        return prompt
    return next((m for m in prompt if m["role"] == "user"), prompt[0])["content"]


def _unusable(reason: str, where: str) -> UnusableRow:
    return UnusableRow(f"{where}: {REASONS[reason]}. Correct or remove the row")


def _from_pair(columns: Mapping[str, Any], where: str) -> tuple[str | Messages, str, str]:
    prompt = _prompt(columns["prompt"], where)
    chosen, rejected = (
        _response(columns[name], prompt, f"{where}, column {name!r}")
        for name in ("chosen", "rejected")
    )
    return prompt, chosen, rejected


def _from_dialogues(columns: Mapping[str, Any], where: str) -> tuple[Messages, str, str]:
    ends = []
    for name in ("chosen", "rejected"):
        place = f"{where}, column {name!r}"
        value = columns[name]
        messages = (
            parse_dialogue(value, place) if isinstance(value, str) else parse_messages(value, place)
        )
        if messages[-1]["role"] != "assistant" or len(messages) < 2:
            raise DataError(
                f"{place}: ends with a turn of {messages[-1]['role']!r} after {len(messages) - 1} "
                "others, expected the assistant's answer to at least one. Correct the row"
            )
        ends.append((messages[:-1], messages[-1]["content"]))
    (history, chosen), (other, rejected) = ends
    if history != other:
        raise _unusable("history", where)
    return history, chosen, rejected


def _number(columns: Mapping[str, Any], name: str, where: str) -> float | None:
    value = columns.get(name)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        raise DataError(
            f"{where}, column {name!r}: found {_describe(value)}, expected a number. Correct it"
        )
    return float(value)


def _prompt(value: Any, where: str) -> str | Messages:
    where = f"{where}, column 'prompt'"
    if not isinstance(value, str):
        return parse_messages(value, where)
    if not value:
        raise DataError(f"{where}: empty text. Remove the row, or correct the prompt")
    if is_dialogue(value):
        history = parse_dialogue(value, where)
        # a prompt may end with the mark of the answer to come
        return history[:-1] if history[-1] == {"role": "assistant", "content": ""} else history
    return value


def _response(value: Any, prompt: str | Messages, where: str) -> str:
    """Return a response's text: the value, or the last of messages that continue the prompt."""
    if isinstance(value, str):
        return value
    messages = parse_messages(value, where)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    *before, last = messages
    if last["role"] != "assistant" or before not in ([], asked):
        raise DataError(
            f"{where}: {len(messages)} messages that end with {last['role']!r}, expected the "
            "assistant's answer, alone or after exactly the prompt's messages. Correct the row"
        )
    return last["content"]


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
