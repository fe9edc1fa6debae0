"""The tokenizer of a model that is made from numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from rlhf_cluster.config.base import Section


class CharacterTokenizer(Section):
    """One token for each printable ASCII character and the newline."""

    type: Literal["characters"] = "characters"


class BpeTokenizer(Section):
    """Byte pairs learned from the texts of a data file, with a chat template."""

    type: Literal["bpe"] = "bpe"
    path: str
    """The data file, any that prompts or preferences can come from; `${NAME}` is replaced by the
    environment variable."""
    vocab_size: int = Field(default=2048, ge=512)
    """Tokens at most, the 256 bytes and special tokens among them; a small file may give fewer."""
    limit: PositiveInt | None = None
    """Learn from the first `limit` rows only."""


TokenizerInit = Annotated[CharacterTokenizer | BpeTokenizer, Field(discriminator="type")]
