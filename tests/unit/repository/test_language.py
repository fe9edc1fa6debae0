"""Docstrings, comments and messages keep to plain words, as language.toml says."""

from __future__ import annotations

import pytest

from tests.unit.repository import language
from tests.unit.repository.language import all_matches, count_rooms, lower, matches, read_table

PATTERNS = language.read_patterns(read_table())


def names(source: str) -> list[str]:
    return [match.pattern.name for match in matches(source, PATTERNS) for _ in range(match.count)]


def test_rooms_that_are_done_have_no_banned_word():
    done = read_table()["done"]
    assert set(done) <= count_rooms().keys()
    found = [str(match) for room, match in all_matches() if room in done and match.pattern.banned]
    assert not found, "\n".join(found)


def test_the_number_of_every_room_only_falls():
    kept, counted = read_table()["numbers"], count_rooms()
    assert kept.keys() == counted.keys(), "run: python -m tests.unit.repository.language"
    grown = [
        f"{room}: {counted[room]} matches, the table has {kept[room]}. Find them by "
        f"`python -m tests.unit.repository.language {room}`, and use the words that it lists"
        for room in counted
        if counted[room] > kept[room]
    ]
    assert not grown, "\n".join(grown)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Of the groups with these numbers, or of all."""', ["S1"]),
        ('"""Discard the groups.\n\nOf all of them."""', []),
        ('class A:\n    x: int = 0\n    """By so many."""', ["S1", "P16"]),
        ('def f():\n    """Raises `OSError`."""', ["S6"]),
        ("x = 1  # the run\n# goes on", ["P1"]),
        ("x = 1  # the run goes\n\n# on", []),
        ("raise ValueError(f'worker {x} is ' 'gone')", ["P4"]),
        ("log.warning('%s is gone', f(g('gone')))", ["P4", "P4"]),
        ("raise A('x') from ValueError('gone')", ["P4"]),
        ("x = 'gone'", []),
        ('"""The key `gone` goes over `x`."""', ["P15"]),
        ('"""Read.\n\n    Args:\n        cure: of the error."""', []),
        ("def _told(): ...", ["N1"]),
        ("def _told() -> bool: ...", []),
        ("def told(): ...\ndef fitted(): ...", ["N1p", "N1p"]),
        ("def _feed(): ...\ndef make_seed(): ...", []),
        ("class A:\n    @property\n    def _told(self): ...", []),
    ],
)
def test_a_match_is_seen_where_it_belongs(source: str, expected: list[str]):
    assert names(source) == expected


def test_numbers_are_rewritten_downwards_only():
    assert lower({"a": 3, "b": 1}, {"a": 2, "b": 5, "new": 4}) == {"a": 2, "b": 1, "new": 4}


def test_the_table_is_rewritten_in_its_section_alone(tmp_path, monkeypatch):
    copy = tmp_path / "language.toml"
    copy.write_text(language.TABLE.read_text())
    monkeypatch.setattr(language, "TABLE", copy)
    before = read_table()
    language.write_numbers({"a": 2, "b": 0})
    after = read_table()
    assert after == before | {"numbers": {"a": 2, "b": 0}}
