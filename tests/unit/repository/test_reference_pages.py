"""docs/reference says what the code says."""

from __future__ import annotations

import re

import pytest
import typer

from rlhf_cluster.cli.commands import app
from rlhf_cluster.config.reference import all_keys, sections
from tests.unit.repository.reference_pages import FOLDER, cell, pages


@pytest.mark.parametrize("name", pages())
def test_a_page_is_what_the_code_makes(name):
    hint = "if that is on purpose: python -m tests.unit.repository.reference_pages"
    assert (FOLDER / name).read_text() == pages()[name], hint


def test_the_folder_has_no_other_page():
    assert {path.name for path in FOLDER.iterdir()} == set(pages())


def test_the_page_of_keys_has_every_section_and_every_key():
    parts = re.split(r"^##+ (.+)$", pages()["configuration.md"], flags=re.MULTILINE)
    by_title = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(by_title) == {"Sections of a run file", *filter(None, sections())}
    for key in all_keys():
        text = by_title[key.section or "Sections of a run file"]
        assert f"\n| `{key.name}` | " in text, key.path
        assert cell(key.description) in text, key.path


def test_the_page_of_commands_has_every_option():
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    parts = re.split(r"^## (.+)$", pages()["commands.md"], flags=re.MULTILINE)
    by_title = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert set(by_title) == set(commands)
    for name, command in commands.items():
        options = [option for p in command.params for option in p.opts if option.startswith("--")]
        assert all(f"\n| `{option}" in by_title[name] for option in options), name


def test_a_cell_keeps_what_markdown_would_read():
    assert cell("`a|<b>` * <c> | d") == r"`a\|<b>` \* \<c\> \| d"
