"""The command `config`: what the keys of run files mean, read from the models that validate them.

A part of `rlhf_cluster.cli`, with the same promises.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlhf_cluster.config.reference import Key


def add_to(app: typer.Typer) -> None:
    app.command()(config)


def config(
    key: Annotated[
        str | None,
        typer.Argument(metavar="KEY", help="A key or a section, such as staleness.on_stale."),
    ] = None,
) -> None:
    """Explain a key or a section of a run file, or list the sections."""
    for line in lines_of(key):
        typer.echo(line)


def lines_of(query: str | None) -> Iterator[str]:
    """Yield the answer to `query`. Raises `ConfigError` for a key that no run file has."""
    from rlhf_cluster.config import reference

    if query is None:
        yield from _columns([(path, _summary(path)) for path in reference.sections() if path])
        return
    path = reference.resolve(query)
    found = [key for key in reference.all_keys() if key.path == path]
    for key in found:
        yield path
        yield from _columns(_facts(key))
    keys = reference.keys_of(path)
    if keys:
        yield from _section(path, keys)


def _summary(path: str) -> str:
    """Return what a section is, in one sentence per different section of this path."""
    from rlhf_cluster.config import reference

    own = [key.summary for key in reference.all_keys() if key.path == path]
    named = [reference.first_sentence(v.description) for v in reference.variants_of(path)]
    return " / ".join(dict.fromkeys(own or named))


def _facts(key: Key) -> list[tuple[str, str]]:
    from rlhf_cluster.config import reference

    rows = [
        ("type", key.type),
        ("default", key.default),
        ("bounds", key.bounds),
        ("exists with", reference.conditions(key)),
        ("run files", ", ".join(key.kinds)),
        ("meaning", key.description),
    ]
    return [(name, text) for name, text in rows if text]


def _section(path: str, keys: Sequence[Key]) -> Iterator[str]:
    from rlhf_cluster.config import reference

    types = reference.types_of(path)
    if types:
        yield f"types of [{path}]:"
        yield from _columns(list(types.items()))
    yield f"keys of [{path}]:"
    rows = []
    for key in keys:
        several = len({each.kinds for each in keys}) > 1
        notes = [reference.conditions(key), ", ".join(key.kinds) if several else ""]
        note = "; ".join(filter(None, notes))
        kind = "choice" if " or " in key.type else key.type
        rows.append((key.name, kind, key.default, key.summary + (f" ({note})" if note else "")))
    yield from _columns(rows)


def _columns(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Yield the rows with all columns but the last as wide as their widest text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        yield f"  {'  '.join(cells)}".rstrip()
