"""Dialogues for supervised fine-tuning: token ids, and which of them are the assistant's own.

    prefix i = the template's text of all before turn i, as generation would be asked for it
    |prefix i|.. |text up to and with turn i|          is what the assistant says in turn i

Promises: every assistant turn with text is trained, its end token included, and nothing else: spans are
where the texts of growing dialogues differ, so nothing that a user writes is ever searched for a mark.
Each span is tokenized apart, so that its border lies where it lies in generation. A template whose text
of a beginning is not the beginning of its text (one that drops earlier reasoning, say) is refused,
unless it marks the assistant's words itself ({% generation %}); then its marks are taken.
An empty assistant turn is context, not trained.

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
    """(token ids int32 [L], trained bool [L]) of a dialogue. `end_ids` end an answer.

    Raises `DataError` that starts with `where`: a dialogue that the template refuses, or a template
    that cannot say what is the assistant's.
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
        trained += _trained(own, ends, tokenizer) if is_answer else [False] * len(own)
    if spans and spans[-1][1] and ids and ids[-1] not in ends and not _closed(ids, trained, ends):
        ids.append(end_ids[0])
        trained.append(True)
    return np.array(ids, dtype=np.int32), np.array(trained, dtype=np.bool_)


def marks_its_answers(tokenizer: PreTrainedTokenizerBase) -> bool:
    """The chat template says itself which text is the assistant's."""
    template = str(tokenizer.chat_template or "")
    return "generation %}" in template and any(
        mark in template for mark in (_MARK, "{%- generation %}", "{%- generation -%}")
    )


def _spans(
    messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, bool]]:
    """(text, whether it is an assistant turn with content) of the whole dialogue, end to end."""
    whole = _render(messages, where, tokenizer, False)
    spans: list[tuple[str, bool]] = []
    done = 0
    for index, message in enumerate(messages):
        if message["role"] != ASSISTANT or not message["content"].strip():
            continue
        if index == 0:
            raise DataError(
                f"{where}: begins with an assistant turn, which nothing asks for. Remove that turn"
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


def _trained(ids: list[int], ends: set[int], tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """All of an answer is trained, but white space that the template puts after its end token."""
    last = max((i for i, token in enumerate(ids) if token in ends), default=len(ids) - 1)
    if str(tokenizer.decode(ids[last + 1 :])).strip():
        last = len(ids) - 1
    return [index <= last for index in range(len(ids))]


def _closed(ids: list[int], trained: list[bool], ends: set[int]) -> bool:
    """The last trained token ends the answer."""
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
        raise _refused(where, error) from error
    ids = np.array(found["input_ids"], dtype=np.int32)
    return ids, np.array(found["assistant_masks"], dtype=np.bool_)


def _render(messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, ask: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    # as above
    except Exception as error:
        raise _refused(where, error) from error
    return str(text)


def _refused(where: str, error: Exception) -> DataError:
    return DataError(
        f"{where}: the chat template cannot render it ({type(error).__name__}: {error}). Correct the "
        "dialogue, or use another template"
    )
