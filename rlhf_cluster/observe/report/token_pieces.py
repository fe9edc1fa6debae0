"""Text of each token of a sample, from the tokenizer of the run's model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Decode = Callable[[Sequence[int]], str]
MAX_PIECES = 600  # tokens whose text is separated


def find_decoder(run_dir: Path, config: Mapping[str, Any]) -> Decode | None:
    """Return the decoder of the run's tokenizer; None where no readable one is at hand."""
    model = config.get("model")
    given = model.get("path") if isinstance(model, Mapping) else None
    folders = [run_dir / "final", run_dir / "model", *([Path(given)] if given else [])]
    for folder in folders:
        path = folder / "tokenizer.json"
        if path.is_file():
            return _decoder(path)
    return None


def _decoder(path: Path) -> Decode | None:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except (
        Exception
    ):  # whatever the library raises for a file that it cannot read: plain text is shown
        return None
    return lambda ids: tokenizer.decode(list(ids), skip_special_tokens=False)


def split_tokens(ids: Sequence[int], whole: str, decode: Decode) -> list[str]:
    """Return the text of each of the first `MAX_PIECES` tokens, which together begin `whole`.

    A character of several tokens is the piece of its last one. Empty if the decoder gives another text
    than `whole`, as one of another tokenizer does.
    """
    pieces: list[str] = []
    start = done = (
        0  # tokens before `start` are context no more; those before `done` have their text
    )
    for end in range(1, min(len(ids), MAX_PIECES) + 1):
        known, grown = decode(ids[start:done]), decode(ids[start:end])
        if grown.endswith("\ufffd") and end < len(ids):  # within a character
            pieces.append("")
            continue
        pieces.append(grown[len(known) :])
        start, done = done, end
    joined = "".join(pieces)
    complete = len(ids) <= MAX_PIECES
    return pieces if (joined == whole if complete else whole.startswith(joined)) else []
