"""A prompt and answers to it as token ids, for stages that compare answers.

Promises:
- the prompt's ids are those that generation would be asked with, and an answer's those that it would
  sample, its end token included: the border between them is the same as in generation;
- `encode_answers` shortens nothing. `cut_prompt` makes pairs shorter and never touches an answer.

Shapes: P prompt tokens, T answer tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.data.dialogue_text import Messages
from rlhf_cluster.errors import DataError
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.offline.train_sft import with_system

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = np.ndarray


def encode_answers(
    prompt: str | Messages,
    answers: Sequence[str],
    where: str,
    context: StageContext,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Ids, list[Ids]]:
    """Encode a prompt and its answers.

    Returns:
        The prompt's ids, int32 [P], and each answer's ids, int32 [T].

    Raises:
        DataError: the row cannot be encoded; the message begins with `where`.
    """
    data = context.data
    if data.template == "chat":
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        messages = with_system(messages, data.system_prompt, data.drop_system, where)
        asked = _render(messages, where, tokenizer, True)
        texts = [
            _answer_text(asked, [*messages, {"role": "assistant", "content": a}], where, tokenizer)
            for a in answers
        ]
        prompt_ids = _ids(asked, tokenizer, False)
    elif isinstance(prompt, str):
        prompt_ids, texts = _ids(prompt, tokenizer, True), list(answers)
    else:
        raise DataError(
            f"{where}: found a dialogue, but data.template = {data.template!r}. Set data.template = "
            "'chat'"
        )
    while prompt_ids[:2] == [tokenizer.bos_token_id] * 2:
        del prompt_ids[0]
    if not prompt_ids:
        raise DataError(f"{where}: the prompt has no tokens. Correct or remove the row")
    ended = [_cut_after_end(_ids(text, tokenizer, False), context.end_ids) for text in texts]
    return np.array(prompt_ids, dtype=np.int32), [np.array(ids, dtype=np.int32) for ids in ended]


def cut_prompt(prompt_ids: Ids, longest_answer: int, max_tokens: int) -> Ids | None:
    """Shorten a prompt so that it and the longest answer have at most `max_tokens` tokens.

    The first token and the last ones are kept. Returns None where fewer than two tokens would be left.
    """
    room = max_tokens - longest_answer
    if room >= len(prompt_ids):
        return prompt_ids
    if room < 2:
        return None
    return np.concatenate([prompt_ids[:1], prompt_ids[len(prompt_ids) - room + 1 :]])


def _answer_text(
    asked: str, messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase
) -> str:
    whole = _render(messages, where, tokenizer, False)
    if not whole.startswith(asked):
        raise DataError(
            f"{where}: the chat template's text of the prompt is not the beginning of its text with an "
            "answer, so the two cannot be separated. Use another template"
        )
    return whole[len(asked) :]


def _cut_after_end(ids: list[int], end_ids: Sequence[int]) -> list[int]:
    """Cut an answer after its last end token. Append one where the template has none."""
    last = max((i for i, token in enumerate(ids) if token in end_ids), default=None)
    return [*ids, end_ids[0]] if last is None else ids[: last + 1]


def _ids(text: str, tokenizer: PreTrainedTokenizerBase, special: bool) -> list[int]:
    found: Any = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return list(found)


def _render(messages: Messages, where: str, tokenizer: PreTrainedTokenizerBase, ask: bool) -> str:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
    # A chat template is a program of the model's author: it may raise anything.
    except Exception as error:
        raise DataError(
            f"{where}: the chat template cannot render it ({type(error).__name__}: {error}). Correct "
            "the dialogue, or use another template"
        ) from error
    return str(text)
