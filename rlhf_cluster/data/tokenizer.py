"""Loading a tokenizer, and the tokens that end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_cluster.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PLAIN_CLASSES = ("TokenizersBackend", "PreTrainedTokenizerFast")
"""Tokenizers that are all in tokenizer.json."""


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in folder `path`, or of hub id `path`. Runs no code from there.

    Raises `DataError`: no such folder, no tokenizer in it, no end token.
    """
    folder = Path(path)
    looks_like_a_folder = folder.is_absolute() or str(path).startswith((".", "~"))
    if looks_like_a_folder and not folder.is_dir():
        raise DataError(f"{path}: no such folder. Give the folder of a model with its tokenizer")
    try:
        tokenizer = _loader(folder).from_pretrained(str(path), trust_remote_code=False)
    # Its tokenizers raise bare Exceptions for a damaged tokenizer.json.
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
    """The class to load with. The one for all tokenizers imports torch, which takes seconds; where the
    folder names the plain class that it would choose, that one is taken at once."""
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
    """The ids that end an answer, sorted: the tokenizer's, and those of generation_config.json."""
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


def refuse_other_tokens(key: str, path: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise `ConfigError` unless the folder `path`, the setting `key`, has a tokenizer with the tokens
    of `tokenizer`: else the probabilities of its model could not be compared token by token."""
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
