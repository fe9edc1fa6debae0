"""Pages of docs: their run files are valid, their keys, commands, messages and names exist."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer

from rlhf_cluster.cli.commands import app
from rlhf_cluster.config.load import load_all
from rlhf_cluster.config.reference import resolve, sections
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.observe.metric_table import TABLE, read_table
from tests.unit.repository.language import strings

GENERATED = Path("docs/reference")
PAGES = [path for path in sorted(Path("docs").rglob("*.md")) if path.parent != GENERATED]
SHORT = [path for path in PAGES if path.parent.name in {"start", "guides"}]
METRICS = read_table(TABLE)
COMMANDS: Mapping[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.M | re.S)


def is_whole(block: str) -> bool:
    """Whether the block is a run file, not a part of one."""
    tree = tomllib.loads(block)
    named = {**tree.get("run", {}), **tree.get("pipeline", {})}
    return "name" in named and "\n# ..." not in block and "\n# model" not in block


FILES = [
    (page, number, block)
    for page in PAGES
    for number, block in enumerate(blocks(page, "toml"))
    if is_whole(block)
]


@pytest.mark.parametrize(
    ("page", "number", "block"), FILES, ids=[f"{page.stem}-{number}" for page, number, _ in FILES]
)
def test_every_run_file_of_a_page_is_valid(page: Path, number: int, block: str, tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(block)
    assert load_all(path)


def test_every_guide_has_a_run_file_or_a_command():
    assert len(FILES) >= 10
    without = [
        page
        for page in SHORT
        if not any(is_whole(b) for b in blocks(page, "toml")) and not called(page)
    ]
    assert without == []


def keys(tree: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield the paths of all keys of a run file whose types are this project's."""
    for name, value in tree.items():
        path = f"{section}.{name}".lstrip(".")
        if section == "stages":
            yield from keys(value)
            continue
        yield path
        tables = value if isinstance(value, list) else [value]
        for table in (table for table in tables if isinstance(table, Mapping)):
            is_free = (
                path in {"stages", "autoscale.pools", "scoring.pools"} or f"{path}.NAME" in TABLES
            )
            known = path == "stages" or is_free or path in TABLES or resolve(path) in TABLES
            if known and ":" not in str(table.get("type", "")):
                yield from keys(table, path)


TABLES = set(sections())


def unknown(block: str) -> list[str]:
    found = []
    for path in keys(tomllib.loads(block)):
        if path not in {"pipeline", "stages", "scoring.pools", "autoscale.pools"}:
            try:
                resolve(path)
            except ConfigError as error:
                found.append(str(error))
    return found


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "toml")], ids=str)
def test_every_key_of_a_page_exists(page: Path):
    if page.name == "extending.md":
        return  # test_extending.py: its sections are of its own types
    assert [fault for block in blocks(page, "toml") for fault in unknown(block)] == []


def test_a_key_that_does_not_exist_is_found():
    block = "[learner]\nlr = 1\n[stages.a.scoring]\nrewards = [{ type = 'numeric', wieght = 2 }]"
    assert [fault.split(":")[0] for fault in unknown(block)] == [
        "learner.lr",
        "scoring.rewards.wieght",
    ]


def called(page: Path) -> list[list[str]]:
    """Return the words of every call of rlhf-cluster on the page."""
    prose = re.sub(r"^```.*?^```$|^#[^\n]*$", "", page.read_text(), flags=re.M | re.S)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    calls = [*lines, *re.findall(r"`([^`\n]+)`", prose)]
    pattern = re.compile(r"(?:[A-Z_]+=\S+ )*rlhf-cluster ([a-zA-Z].*)")
    return [shlex.split(match[1].split(" #")[0]) for match in map(pattern.match, calls) if match]


def faults(words: list[str]) -> list[str]:
    name, *rest = words
    if name == "COMMAND":
        return []
    if name not in COMMANDS:
        return [f"no command {name}"]
    known = {option for parameter in COMMANDS[name].params for option in parameter.opts} | {
        "--help"
    }
    wrong = [
        f"{name} has no {word}" for word in rest if word.startswith("--") and word not in known
    ]
    files = [word for word in rest if word.startswith("configs/")]
    return wrong + [f"no file {word}" for word in files if not Path(word).exists()]


def test_every_command_of_a_page_exists():
    calls = [(page, words) for page in PAGES for words in called(page)]
    assert len(calls) > 50
    assert [f"{page}: {fault}" for page, words in calls for fault in faults(words)] == []
    assert faults(["runn"]) == ["no command runn"]
    assert faults(["run", "configs/none.toml", "--over"]) == [
        "run has no --over",
        "no file configs/none.toml",
    ]


def test_every_metric_of_a_guide_is_one_of_the_table():
    groups = {name.partition("/")[0] for name in METRICS}
    spans = [
        (page, span)
        for page in SHORT
        for span in re.findall(r"`(\w+/\w+)`", page.read_text())
        if span.partition("/")[0] in groups - {"data"}
    ]
    assert len(spans) >= 8
    assert [(page, span) for page, span in spans if span not in METRICS] == []


def messages() -> set[str]:
    """Return every text of the product but docstrings, each value as {}."""
    found = set()
    for folder in ("rlhf_cluster", "actors"):
        for path in Path(folder).rglob("*.py"):
            nodes = list(ast.walk(ast.parse(path.read_text())))
            docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
            for node in nodes:
                if isinstance(node, ast.JoinedStr | ast.Constant) and id(node) not in docstrings:
                    found.update(" ".join(words.split()) for _, words in strings(node))
    return found


def test_every_message_of_the_troubleshooting_page_is_one_of_the_code():
    titles = re.findall(r"^### `+ ?(.+?) ?`+$", Path("docs/troubleshooting.md").read_text(), re.M)
    assert len(titles) >= 25
    known = "\n".join(sorted(messages()))
    assert [title for title in titles if not in_code(title, known)] == []
    assert not in_code("... took longer than ... parsecs", known)


def in_code(title: str, known: str) -> bool:
    """Whether a message has the words of `title`; ... stands for a value."""
    parts = [re.escape(part.strip()) for part in title.split("...") if part.strip()]
    return re.search(r"[^\n]*?\{\}[^\n]*?".join(parts), known) is not None


def test_every_key_for_who_comes_from_another_system_is_one_of_ours():
    text = Path("docs/coming_from.md").read_text()
    rows = re.findall(r"^\| `[^|]+ \| ([^|]+) \|", text, re.M)
    named = [key for row in rows for key in re.findall(r"`([\w.]+)`", row)]
    assert len(named) >= 60
    assert [key for key in named if resolve(key) != key] == []
    assert len(re.findall(r"^## From ", text, re.M)) == 3


def test_what_the_python_page_names_can_be_imported():
    text = Path("docs/python_api.md").read_text()
    named = re.findall(r"`(rlhf_cluster[\w.]*):(\w+)`", text)
    assert len(named) >= 12
    assert [x for x in named if not hasattr(importlib.import_module(x[0]), x[1])] == []
    for block in blocks(Path("docs/python_api.md"), "python"):
        exec(compile(block, "python_api.md", "exec"), {})


def test_the_rewards_of_the_quick_start_are_the_measured_ones():
    figures = json.loads(Path("benchmarks/results/loop.json").read_text())["figures"]
    text = Path("docs/start/quickstart.md").read_text()
    [shown] = re.findall(r"reward of (0\.\d\d) .*? (0\.\d\d) after", text, re.S)
    measured = (figures["reward_before"], figures["reward_after"])
    assert tuple(map(float, shown)) == tuple(round(value, 2) for value in measured)
