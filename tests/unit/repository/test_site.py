"""The site of the documents: it has every page, and its check finds what is loaded from elsewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

CHECK = runpy.run_path("deploy/check_site.py")
SETTINGS = Path("mkdocs.yml").read_text()


def test_every_page_stands_once_in_the_navigation():
    nav = SETTINGS.partition("\nnav:\n")[2]
    named = re.findall(r": ([\w/]+\.md)$", nav, re.M)
    pages = [str(path.relative_to("docs")) for path in Path("docs").rglob("*.md")]
    assert sorted(named) == sorted(pages)


def test_no_font_is_asked_of_a_server():
    assert re.search(r"^  font: false", SETTINGS, re.M)


def test_a_broken_link_fails_the_build():
    """With --quiet mkdocs counts no warnings, so that --strict refuses nothing."""
    [command] = re.findall(r"-m mkdocs (.*)", Path("Makefile").read_text())
    assert command == "build --strict"
    links = SETTINGS.partition("\nvalidation:\n")[2].partition("\n\n")[0]
    assert links.count(": warn") == 7


MARKED = re.compile(r"( {0,3}(?P<item>[-*]|\d+\.) )|(?P<table>\|)")


def unread(text: str) -> list[str]:
    """Return the lines that GitHub reads as part of a list or table, and the site does not."""
    found, before = [], ""
    for line in re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S).splitlines():
        match, earlier = MARKED.match(line), MARKED.match(before)
        starts = before.strip() and not earlier and not before.startswith("  ")
        if match and (starts or (match["item"] and line.startswith(" "))):
            found.append(line)
        before = line
    return found


def test_lists_and_tables_are_read_as_such_by_the_site_too():
    assert unread("a\n\n- b\n  c\n- d\n    - e\n\n| f |\n|---|\n") == []
    assert unread("a\n- b\n  - c\n\nd\n| e |\n1. f") == ["- b", "  - c", "| e |"]
    found = {str(path): unread(path.read_text()) for path in Path("docs").rglob("*.md")}
    assert {path: lines for path, lines in found.items() if lines} == {}


PAGE = '<html><link rel="stylesheet" href="a/b.css"><a href="https://x.org">out</a>{}</html>'


def built(folder: Path, body: str = "", style: str = "") -> list[str]:
    (folder / "a").mkdir()
    (folder / "a/b.css").write_text(style)
    (folder / "a/c d.png").write_bytes(b"")
    (folder / "index.html").write_text(PAGE.format(body))
    return list(CHECK["faults"](folder))


def test_a_site_that_loads_its_own_files_has_no_fault(tmp_path: Path):
    body = '<img src="a/c%20d.png"><link rel="canonical" href="https://y.org/">'
    style = (
        "/* url(https://z.org) */ a { background: url(data:image/png;base64,AAAA) url('c d.png') }"
    )
    assert built(tmp_path, body, style) == []


@pytest.mark.parametrize(
    ("body", "style", "fault"),
    [
        ('<script src="https://cdn.org/x.js"></script>', "", "https://cdn.org/x.js"),
        ('<link rel="preconnect" href="//fonts.org">', "", "//fonts.org"),
        ('<img srcset="https://i.org/1.png 2x">', "", "https://i.org/1.png"),
        ("", "@import 'https://s.org/t.css';", "https://s.org/t.css"),
        ("", "a { src: url(https://f.org/f.woff2) }", "https://f.org/f.woff2"),
        ("<style>a { src: url(http://f.org/g) }</style>", "", "http://f.org/g"),
    ],
)
def test_what_comes_from_elsewhere_is_named(tmp_path: Path, body: str, style: str, fault: str):
    [line] = built(tmp_path, body, style)
    assert line.endswith(f"{fault} is loaded from elsewhere")


def test_a_file_that_is_missing_and_a_site_without_pages_are_faults(tmp_path: Path):
    assert list(CHECK["faults"](tmp_path)) == [f"{tmp_path}: no page"]
    [line] = built(tmp_path, '<img src="a/none.png">')
    assert line == "index.html: a/none.png does not exist"
