"""docs/reference: the pages of all configuration keys and all commands, made from the code.

python -m tests.unit.repository.reference_pages     # write the pages again, after a change on purpose
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from rlhf_cluster.cli.commands import app
from rlhf_cluster.config.reference import (
    Key,
    all_keys,
    conditions,
    keys_of,
    sections,
    types_of,
    variants_of,
)

FOLDER = Path("docs/reference")

NOTE = """\
This page is made from the code: change a docstring or an option there, then run
`python -m tests.unit.repository.reference_pages`.
"""

INTRODUCTION = f"""\
# Configuration keys

{NOTE}
Every key of every section of a run file. `rlhf-cluster config KEY` prints the same of one key or
section. A run file is one of four kinds:

| Kind | A file with |
|---|---|
| run | no [stage]: reinforcement learning |
| stage | [stage], trained offline |
| data set | [stage] of type "generate" |
| pipeline | [pipeline] and [stages.NAME], each a run file of another kind |

`required`: the key must be given. `none`: it is not set, and the description says what that means.
`its defaults`: the section may be left out. Where keys depend on the section's `type`, or on the kind
of the file, the column "Only with" says so.

"""


def pages() -> dict[str, str]:
    """Content of each page by its file name."""
    return {"configuration.md": configuration_page(), "commands.md": commands_page()}


def configuration_page() -> str:
    tops = list(dict.fromkeys(path.partition(".")[0] for path in sections() if path))
    links = "\n".join(f"- [{top}](#{anchor(top)})" for top in tops)
    text = [INTRODUCTION, links, "\n\n## Sections of a run file\n\n", table(keys_of(""))]
    for path in filter(None, sections()):
        level = "##" if "." not in path else "###"
        text.append(f"\n{level} {path}\n\n{head(path)}{table(keys_of(path))}")
    return "".join(text)


def head(path: str) -> str:
    """What a section is: its kinds of run files, its types, and what it holds."""
    own = [key for key in all_keys() if key.path == path]
    kinds = dict.fromkeys(kind for key in keys_of(path) for kind in key.kinds)
    lines = [f"In: {', '.join(kinds)}.", ""]
    described = [(conditions(key) or ", ".join(key.kinds), key.description) for key in own]
    texts = described or [("", v.description) for v in variants_of(path)]
    lines += [f"- {whose}: {text}" if len(texts) > 1 else text for whose, text in texts]
    if types := types_of(path):
        lines += ["", "| `type` | What it is |", "|---|---|"]
        lines += [f"| `{name}` | {cell(text)} |" for name, text in types.items()]
    return "\n".join([*lines, "", ""])


def table(keys: Sequence[Key]) -> str:
    several = len({key.kinds for key in keys}) > 1
    lines = ["| Key | Type | Default | Only with | Description |", "|---|---|---|---|---|"]
    for key in keys:
        only = "; ".join(filter(None, [conditions(key), ", ".join(key.kinds) if several else ""]))
        type_ = f"{key.type}, {key.bounds}" if key.bounds else key.type
        cells = [f"`{key.name}`", type_, key.default, only, key.description]
        lines.append(f"| {' | '.join(map(cell, cells))} |")
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    group: Any = typer.main.get_command(app)
    text = [f"# Commands\n\n{NOTE}\n{group.help}\n"]
    for name, command in sorted(group.commands.items()):
        context = command.context_class(command, info_name=f"rlhf-cluster {name}")
        usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
        text.append(f"\n## {name}\n\n```\n{usage}\n```\n\n{plain(command.help or '')}\n")
        rows = list(parameters(command))
        if rows:
            lines = ["", "| Parameter | Default | Description |", "|---|---|---|", *rows]
            text.append("\n".join(lines) + "\n")
    return "".join(text)


def parameters(command: Any) -> Iterator[str]:
    for parameter in command.params:
        metavar = parameter.metavar or ""
        names = [name for name in parameter.opts if name.startswith("--")]
        is_flag = getattr(parameter, "is_flag", False)
        shown = " ".join([*names[:1], *([] if is_flag else [metavar])]).strip()
        default = "required" if parameter.required else default_text(parameter.default)
        help_ = getattr(parameter, "help", None) or ""
        yield f"| `{shown}` | {default} | {cell(help_)} |"


def default_text(value: object) -> str:
    return "" if value in (None, False, ()) or callable(value) else str(value)


def plain(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def cell(text: str) -> str:
    """Text that a cell of a Markdown table shows as it is."""
    parts = re.split(r"(`[^`]*`)", text.replace("|", r"\|"))
    return "".join(p if p.startswith("`") else re.sub(r"([<>*])", r"\\\1", p) for p in parts)


def anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9_-]", "", title.lower().replace(" ", "-"))


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for page, content in pages().items():
        (FOLDER / page).write_text(content)
