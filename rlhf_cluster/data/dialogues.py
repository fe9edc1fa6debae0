r"""Dialogues: parsed from a text or from messages, and encoded for supervised fine-tuning.

A text holds turns as in hh-rlhf: "\n\nHuman: ...\n\nAssistant: ...". An encoded dialogue is its token
ids, and which of them are the assistant's:

    prefix i = the template's text of all turns before turn i, with the generation prompt
    |prefix i| .. |text up to and including turn i|    is the text of the assistant in turn i

Promises:
- no character of a turn is dropped except white space at its ends. Text before the first mark, and a
  text without any mark, is refused;
- every assistant turn with text is trained, including its end token, and nothing else. An empty
  assistant turn is context and is not trained;
- the text of a turn is found by comparing the template's texts of growing dialogues. A user's text is
  never searched for a mark;
- each span is tokenized separately, so that token borders are where they are in generation;
- a template whose text of the first turns is not the beginning of its text of all turns is refused (for
  example one that drops earlier reasoning). If a template marks the assistant's words itself
  ({% generation %}), its marks are used instead.

Shapes: L tokens of a dialogue.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Messages = list[dict[str, str]]

ROLES = {"Human": "user", "Assistant": "assistant", "System": "system"}

ASSISTANT = "assistant"
_GENERATION_MARK = "{% generation %}"
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


def encode_dialogue(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, end_ids: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Tokenize a dialogue, and return (token ids int32 [L], trained bool [L]).

    `end_ids` are the tokens that end an answer. Raises `DataError`, starting with `where`, if the
    template refuses the dialogue or does not show which text is the assistant's.
    """
    if marks_its_answers(tokenizer):
        return _by_marks(messages, where, tokenizer)
    spans = _spans(messages, where, tokenizer)
    ends = {*end_ids, *(tokenizer.all_special_ids or ())}
    ids: list[int] = []
    trained: list[bool] = []
    for text, is_answer in spans:
        own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids += own
        trained += _answer_mask(own, ends, tokenizer) if is_answer else [False] * len(own)
    if (
        spans
        and spans[-1][1]
        and ids
        and ids[-1] not in ends
        and not _is_closed(ids, trained, ends)
    ):
        ids.append(end_ids[0])
        trained.append(True)
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_)


def marks_its_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template itself marks the assistant's text."""
    template = str(tokenizer.chat_template or "")
    return "generation %}" in template and any(
        mark in template for mark in (_GENERATION_MARK, "{%- generation %}", "{%- generation -%}")
    )


def _spans(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Split the template's text into (text, whether it is an assistant turn with content)."""
    whole = render_dialogue(messages, where, tokenizer, False)
    spans: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT or not message["content"].strip():
            continue
        if index == 0:
            raise DataError(
                f"{where}: begins with an assistant turn, which answers nothing. Remove that turn"
            )
        begin = render_dialogue(messages[:index], where, tokenizer, True)
        end = render_dialogue(messages[: index + 1], where, tokenizer, False)
        for text in (begin, end):
            if not whole.startswith(text) or len(text) < done:
                raise DataError(
                    f"{where}: the chat template's text of the first {index + 1} turns is not the "
                    "beginning of its text of all, so what the assistant said cannot be found in it. "
                    "Use a template that renders earlier turns alike, or one that marks the "
                    f"assistant's words with {_GENERATION_MARK}"
                )
        spans += [(whole[done : len(begin)], False), (whole[len(begin) : len(end)], True)]
        done = len(end)
    if done < len(whole):
        spans.append((whole[done:], False))
    return [(text, is_answer) for text, is_answer in spans if text]


def _answer_mask(ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Mark all tokens of an answer, except white space that the template puts after its end token."""
    last = max((i for i, token in enumerate(ids) if token in ends), default=len(ids) - 1)
    if str(tokenizer.decode(ids[last + 1 :])).strip():
        last = len(ids) - 1
    return [index <= last for index in range(len(ids))]


def _is_closed(ids: list[int], trained: list[bool], ends: set[int]) -> bool:
    """Whether the last trained token ends an answer."""
    return next((t in ends for t, own in zip(ids[::-1], trained[::-1], strict=True) if own), False)


def _by_marks(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[np.ndarray, np.ndarray]:
    try:
        found: Any = tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
    # A chat template is a program of the model's author: it may raise anything.
    except Exception as error:
        raise _render_error(where, error) from error
    ids = np.array(found["input_ids"], dtype=np.int32)
    return ids, np.array(found["assistant_masks"], dtype=np.bool_)


def render_dialogue(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, ask: bool
) -> str:
    """Return the chat template's text; `ask` adds what asks for an answer. Raises `DataError`."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    # as above
    except Exception as error:
        raise _render_error(where, error) from error
    return str(text)


def _render_error(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: the chat template cannot render it ({type(error).__name__}: {error}). Correct the "
        "dialogue, or use another template"
    )
