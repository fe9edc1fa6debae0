"""Tokenizers: loading, tokens that end an answer, and token ids of a prompt.

Promises:
- a prompt is tokenized once, here, and is not shortened;
- it starts with exactly one beginning-of-sequence token if the tokenizer or its template adds one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_cluster.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_cluster.sections.offline_stage import StageData
    from rlhf_cluster.sections.rl_run import Data


PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Classes of tokenizers that tokenizer.json defines completely."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of folder or hub id `path`. Runs no code from there.

    Raises `DataError`: no such folder, no tokenizer in it, no end token.
    """
    folder = Path(path)
    looks_like_a_folder = folder.is_absolute() or str(path).startswith((".", "~"))
    if looks_like_a_folder and not folder.is_dir():
        raise DataError(f"{path}: no such folder. Give the folder of a model with its tokenizer")
    try:
        tokenizer = _loader(folder).from_pretrained(str(path), trust_remote_code=False)
    # The tokenizers library raises bare Exceptions for a damaged tokenizer.json.
    except Exception as error:
        raise DataError(
            f"{path}: no tokenizer can be loaded ({type(error).__name__}: {error}). Give a folder "
            "with tokenizer.json, or set model.tokenizer to one"
        ) from error
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{path}: the tokenizer has no end token (eos_token): answers would never end. Set "
            "eos_token in its tokenizer_config.json"
        )
    return tokenizer


def _loader(folder: Path) -> Any:
    """Return the class to load with.

    AutoTokenizer imports torch, which takes seconds. If the folder names a plain class, which
    AutoTokenizer would choose, that class is used directly.
    """
    try:
        named = json.loads((folder / "tokenizer_config.json").read_bytes())["tokenizer_class"]
    except (OSError, ValueError, KeyError, TypeError):
        named = None
    if named in PLAIN_CLASSES:
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def end_token_ids(tokenizer: PreTrainedTokenizerBase, model_dir: str | Path) -> tuple[int, ...]:
    """Return the ids that end an answer, sorted: the tokenizer's and generation_config.json's."""
    ids: list[Any] = [tokenizer.eos_token_id]
    path = Path(model_dir) / "generation_config.json"
    try:
        found = json.loads(path.read_bytes()).get("eos_token_id")
    except FileNotFoundError:
        found = None
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read ({error}). Repair or remove it") from error
    if found is not None:
        ids += found if isinstance(found, list) else [found]
    return tuple(sorted({int(token) for token in ids}))


def check_same_tokens(key: str, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` unless the tokenizer in folder `path` has the tokens of `tokenizer`.

    With other tokens, the two models' probabilities could not be compared token by token. `key` is the
    setting of `path`.
    """
    try:
        own = load_tokenizer(path).get_vocab()
    except DataError as error:
        raise ConfigError(f"{key}: {error}") from error
    differing = sorted({token for token, _ in own.items() ^ tokenizer.get_vocab().items()})
    if differing:
        raise ConfigError(
            f"{key} = {str(path)!r}: its tokenizer and the policy's differ in {len(differing)} tokens, "
            f"such as {differing[0]!r}: the two cannot be compared token by token. Give a model with "
            "the policy's tokenizer"
        )


Messages = list[dict[str, str]]


def check_template(data: Data | StageData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `DataError` if the data needs a chat template and the tokenizer has none."""
    if data.template == "chat" and not tokenizer.chat_template:
        raise DataError(
            f"data.template = 'chat': the tokenizer {tokenizer.name_or_path or '(unnamed)'} has no "
            "chat template. Add chat_template to its tokenizer_config.json, take an instruction-"
            "tuned model, or set data.template = 'none'"
        )


def render(value: Any, where: str, data: Data, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the token ids, int32 [P], of a prompt (text or messages).

    Raises `DataError` for other values. It starts with `where`: file, place and column.
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
            f"{where}: has its own system message, and data.system_prompt is set. Remove one"
        )
    return [{"role": "system", "content": data.system_prompt}, *messages]


def _one_bos(ids: list[Any], bos: Any) -> list[int]:
    while bos is not None and ids[:2] == [bos, bos]:
        del ids[0]
    return ids


def _describe(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
