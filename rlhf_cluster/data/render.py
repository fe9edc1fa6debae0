"""From a row to the token ids of its prompt.

Promises: a prompt is tokenized once, here, and never again; it starts with exactly one
beginning-of-sequence token when the tokenizer or its template puts one; nothing is shortened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.config.sections import Data
    from rlhf_cluster.config.stage_sections import StageData

Messages = list[dict[str, str]]


def check_template(data: Data | StageData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` when the chat template is asked for and the tokenizer has none."""
    if data.template == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data.template = 'chat': the tokenizer {tokenizer.name_or_path or '(unnamed)'} has no "
            "chat template. Add chat_template to its tokenizer_config.json, take an instruction-"
            "tuned model, or set data.template = 'none'"
        )


def render(value: Any, where: str, data: Data, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """The token ids, int32 [P], of a prompt as the data set gave it: text, or messages.

    `where` names file, place and column in the `DataError` for what is neither.
    """
    _check_value(value, where, data)
    try:
        if data.template == "chat":
            ids = tokenizer.apply_chat_template(
                _messages(value, where, data), add_generation_prompt=True, return_dict=False
            )
        else:
            ids = tokenizer(value, verbose=False)["input_ids"]
    # A chat template is a program of the model's author: it may raise anything.
    except Exception as error:
        raise DataError(
            f"{where}: the tokenizer cannot render it ({type(error).__name__}: {error}). Correct "
            "the prompt, or data.template"
        ) from error
    ids = _one_bos(list(ids), tokenizer.bos_token_id)
    if not ids:
        raise DataError(f"{where}: no tokens. Remove the row, or correct the prompt")
    return np.array(ids, dtype=np.int32)


def _check_value(value: Any, where: str, data: Data) -> None:
    if isinstance(value, str):
        if not value:
            raise DataError(f"{where}: empty text. Remove the row, or correct the prompt")
        return
    are_messages = (
        isinstance(value, list)
        and value
        and all(
            isinstance(m, dict) and all(isinstance(m.get(k), str) for k in ("role", "content"))
            for m in value
        )
    )
    if not are_messages:
        raise DataError(
            f"{where}: found {_describe(value)}, expected text or a list of {{role, content}} "
            "messages. Set data.prompt_column to the column with the prompt"
        )
    if data.template != "chat":
        raise DataError(
            f"{where}: found chat messages, but data.template = {data.template!r}. Set "
            "data.template = 'chat'"
        )


def _messages(value: str | Messages, where: str, data: Data) -> Messages:
    messages = [{"role": "user", "content": value}] if isinstance(value, str) else value
    if data.system_prompt is None:
        return messages
    if messages[0]["role"] == "system":
        raise DataError(
            f"{where}: has a system message of its own, and data.system_prompt is set. Remove one"
        )
    return [{"role": "system", "content": data.system_prompt}, *messages]


def _one_bos(ids: list[Any], bos: Any) -> list[int]:
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
