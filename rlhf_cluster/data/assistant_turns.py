"""Dialogues for supervised fine-tuning: token ids, and which of them are the assistant's.

    prefix i = the template's text of all turns before turn i, with the generation prompt
    |prefix i| .. |text up to and including turn i|    is the text of the assistant in turn i

Promises:
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

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.data.dialogue_text import Messages
from rlhf_cluster.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT = "assistant"
_MARK = "{% generation %}"


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
        mark in template for mark in (_MARK, "{%- generation %}", "{%- generation -%}")
    )


def _spans(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """Split the template's text into (text, whether it is an assistant turn with content)."""
    whole = _render(messages, where, tokenizer, False)
    spans: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT or not message["content"].strip():
            continue
        if index == 0:
            raise DataError(
                f"{where}: begins with an assistant turn, which answers nothing. Remove that turn"
            )
        begin = _render(messages[:index], where, tokenizer, True)
        end = _render(messages[: index + 1], where, tokenizer, False)
        for text in (begin, end):
            if not whole.startswith(text) or len(text) < done:
                raise DataError(
                    f"{where}: the chat template's text of the first {index + 1} turns is not the "
                    "beginning of its text of all, so what the assistant said cannot be found in it. "
                    "Use a template that renders earlier turns alike, or one that marks the "
                    f"assistant's words with {_MARK}"
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


def _render(messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, ask: bool) -> str:
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
