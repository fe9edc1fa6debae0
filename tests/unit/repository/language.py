"""Matches of the table language.toml in docstrings, comments, messages and names of the product.

python -m tests.unit.repository.language          # lower the numbers of the table
python -m tests.unit.repository.language ROOM     # list the matches of a room
"""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from tests.unit.repository.test_layers import PATHS, room_of

TABLE = Path(__file__).with_name("language.toml")

Kind = Literal["docstring", "comment", "message", "function"]

LOGGED = {"debug", "info", "warning", "error", "exception", "critical"}


@dataclass(frozen=True, slots=True)
class Text:
    """One docstring, comment, message or name of a function, with white space collapsed."""

    kind: Kind
    line: int
    words: str


@dataclass(frozen=True, slots=True)
class Pattern:
    """One `[[pattern]]` of the table."""

    name: str
    regex: re.Pattern[str]
    place: Literal["start", "text", "function"]
    banned: bool
    say: str

    def count(self, text: Text) -> int:
        if self.place == "function":
            return int(text.kind == "function" and bool(self.regex.fullmatch(text.words)))
        if self.place == "start":
            return int(text.kind == "docstring" and bool(self.regex.match(text.words)))
        return 0 if text.kind == "function" else len(self.regex.findall(text.words))


@dataclass(frozen=True, slots=True)
class Match:
    """A text that a pattern matches `count` times."""

    path: Path
    text: Text
    pattern: Pattern
    count: int

    def __str__(self) -> str:
        words = self.text.words if len(self.text.words) < 160 else self.text.words[:160] + " ..."
        return f"{self.path}:{self.text.line} {self.pattern.name} ({self.pattern.say}): {words}"


def read_table() -> dict:
    return tomllib.loads(TABLE.read_text())


def read_patterns(table: Mapping) -> list[Pattern]:
    """Build the patterns. Those of texts ignore case, but for P26, where the capital matters."""
    return [
        Pattern(
            row["name"],
            re.compile(
                row["regex"],
                re.IGNORECASE if row["in"] == "text" and row["name"] != "P26" else 0,
            ),
            row["in"],
            row["rule"] == "ban",
            row["say"],
        )
        for row in table["pattern"]
    ]


def texts(source: str) -> Iterator[Text]:
    """Yield every docstring, run of comment lines, error or log message, and name of a function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield Text("docstring", node.lineno, collapse(without_names(node.value.value)))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not is_value(node):
                yield Text("function", node.lineno, node.name)
        elif is_message(node):
            yield from (Text("message", line, collapse(words)) for line, words in strings(node))
    yield from comments(source)


def is_message(node: ast.AST) -> bool:
    """Whether the call builds an error or writes to a log."""
    if not isinstance(node, ast.Call):
        return False
    called = node.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    is_log = isinstance(called, ast.Attribute) and name in LOGGED
    return is_log or name.endswith(("Error", "Lost", "Died", "Silent", "Failed", "Exit"))


def strings(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the outermost strings below `node`; a value inside an f-string becomes {}."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [
            str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
        ]
        yield node.lineno, "".join(parts)
    else:
        for child in ast.iter_child_nodes(node):
            if not is_message(child):  # it is walked by itself
                yield from strings(child)


def is_value(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether the function reads like a value: a property, or one that returns a bool."""
    decorators = {ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list}
    returns = ast.unparse(function.returns) if function.returns else ""
    return bool(decorators & {"property", "cached_property", "setter"}) or returns == "bool"


def comments(source: str) -> Iterator[Text]:
    """Yield the comments; lines that follow each other are one."""
    words: list[str] = []
    first = last = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        if words and token.start[0] != last + 1:
            yield Text("comment", first, collapse(" ".join(words)))
            words = []
        if not words:
            first = token.start[0]
        words.append(token.string.lstrip("# "))
        last = token.start[0]
    if words:
        yield Text("comment", first, collapse(" ".join(words)))


def without_names(docstring: str) -> str:
    """Remove the names of arguments and errors that begin an indented line: they are not prose."""
    return re.sub(r"(?m)^ +\w+(, \w+)*:", "", docstring)


def collapse(words: str) -> str:
    """Make one line of the text, and hide what is inside code spans: names are not prose."""
    return re.sub(r"`[^`]*`", "`x`", " ".join(words.split()))


@cache
def all_matches() -> tuple[tuple[str, Match], ...]:
    """Every match in the product, with its room."""
    patterns = read_patterns(read_table())
    return tuple(
        (room_of(module) or module, match)
        for module, path in PATHS.items()
        for match in matches(path.read_text(), patterns, path)
    )


def matches(source: str, patterns: list[Pattern], path: Path = Path()) -> Iterator[Match]:
    """Yield what the patterns match in one file."""
    for text in texts(source):
        for pattern in patterns:
            if count := pattern.count(text):
                yield Match(path, text, pattern, count)


def count_rooms() -> dict[str, int]:
    """Count the matches of all patterns in each room."""
    numbers = dict.fromkeys(sorted(room_of(module) or module for module in PATHS), 0)
    for room, match in all_matches():
        numbers[room] += match.count
    return numbers


def lower(kept: Mapping[str, int], counted: Mapping[str, int]) -> dict[str, int]:
    """Return the counted numbers, none of them greater than the one that is kept."""
    return {room: min(number, kept.get(room, number)) for room, number in counted.items()}


def write_numbers(numbers: Mapping[str, int]) -> None:
    """Replace the section [numbers] of the table; everything else stays."""
    lines = "".join(f'"{room}" = {number}\n' for room, number in numbers.items())
    text = re.sub(r"(?s)(?<=\[numbers\]\n).*?(?=\n#|\n\[)", lines, TABLE.read_text(), count=1)
    TABLE.write_text(text)


if __name__ == "__main__":
    if sys.argv[1:]:
        print(*(match for room, match in all_matches() if room in sys.argv[1:]), sep="\n")
    else:
        write_numbers(lower(read_table()["numbers"], count_rooms()))
