"""The tokenizer of a run that is only looked at, to show its token ids as text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_cluster.data.tokenizer import load_tokenizer
from rlhf_cluster.errors import DataError

Decode = Callable[[Sequence[int]], str]


def find_decoder(run_dir: Path, settings: Mapping[str, Any] | None) -> tuple[Decode | None, str]:
    """Return a function from token ids to text, or None and the reason.

    `settings` are those that the run was started with.
    """
    model = (settings or {}).get("model") or {}
    folder = model.get("tokenizer") or model.get("path") or str(run_dir / "model")
    try:
        tokenizer = load_tokenizer(folder)
    except DataError as error:
        return None, f"no text of stored responses: {str(error).partition('. ')[0]}"
    return lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=False)), ""
