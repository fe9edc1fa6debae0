"""Rooms import in one direction, as layers_table.toml says, and stay within their budgets."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

TABLE = tomllib.loads(Path(__file__).with_name("layers_table.toml").read_text())
ROOMS = {room["name"]: room for room in TABLE["room"]}
ORDER = {name: place for place, name in enumerate(ROOMS)}


def name_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


PATHS = {name_of(p): p for root in ("rlhf_cluster", "actors") for p in Path(root).rglob("*.py")}


def room_of(module: str) -> str | None:
    """Room of a module; None for the two top packages, which hold nothing but a docstring."""
    name = module.removeprefix("rlhf_cluster.")
    fits = [room for room in ROOMS if name == room or name.startswith(room + ".")]
    return max(fits, key=len, default=None)


def imports(source: str, package: str = "") -> Iterator[tuple[str, int]]:
    """Modules of this project that a file imports, anywhere in it, with the line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package.split(".")[: -node.level + 1 or None]) if node.level else ""
            module = ".".join(filter(None, (above, node.module)))
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                yield (inner if inner in PATHS else module), node.lineno


def forbidden(module: str, source: str) -> list[str]:
    """Imports of `module` that the table does not allow."""
    own = room_of(module)
    found = []
    for imported, line in imports(source, module.rpartition(".")[0]):
        room = room_of(imported) if imported.split(".")[0] in ("rlhf_cluster", "actors") else None
        if room is not None and room != own and room not in ROOMS[str(own)]["may_import"]:
            found.append(f"{module}:{line} imports {imported}: {own} may not import {room}")
    return found


def test_every_module_is_in_a_room():
    rooms = {module: room_of(module) for module in PATHS}
    assert {m for m, room in rooms.items() if room is None} <= {"rlhf_cluster", "actors"}
    assert ROOMS.keys() <= set(rooms.values()), "a room without files"


def test_the_table_allows_only_rooms_above():
    wrong = [
        f"{name} may import {other}"
        for name, room in ROOMS.items()
        for other in room["may_import"]
        if ORDER.get(other, len(ORDER)) >= ORDER[name]
    ]
    assert not wrong
    for room in TABLE["future"]:
        place = ORDER[room["after"]]
        assert {other for other in room["may_import"] if ORDER[other] > place} == set()


def test_no_room_imports_what_the_table_does_not_allow():
    assert [text for m, p in PATHS.items() for text in forbidden(m, p.read_text())] == []


def test_the_table_allows_nothing_that_no_file_needs():
    used = {
        (room_of(module), room_of(imported))
        for module, path in PATHS.items()
        for imported, _ in imports(path.read_text(), module.rpartition(".")[0])
    }
    allowed = {(name, other) for name, room in ROOMS.items() for other in room["may_import"]}
    assert allowed - used == set()


@pytest.mark.parametrize(
    "source",
    [
        "from rlhf_cluster.config import RunConfig",
        "import rlhf_cluster.config.run_config",
        "def f():\n    from rlhf_cluster import config",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rlhf_cluster.config as c",
        "from ..config import RunConfig",
    ],
)
def test_an_import_is_seen_wherever_it_is(source: str):
    assert len(forbidden("rlhf_cluster.weights.sync", source)) == 1
    assert forbidden("rlhf_cluster.buffer.buffer", source) == []


def test_rooms_stay_within_their_budget_of_lines():
    lines: dict[str, int] = dict.fromkeys(ROOMS, 0)
    for module, path in PATHS.items():
        if (room := room_of(module)) is not None:
            lines[room] += path.read_text().count("\n")
    over = {
        name: f"{lines[name]} lines, budget {room['max_lines']}"
        for name, room in ROOMS.items()
        if lines[name] > room["max_lines"]
    }
    assert not over


def file_graph() -> Mapping[str, set[str]]:
    return {
        module: {
            imported
            for imported, _ in imports(path.read_text(), module.rpartition(".")[0])
            if imported in PATHS and imported != module
        }
        for module, path in PATHS.items()
    }


def test_no_files_import_each_other_in_a_circle():
    TopologicalSorter(file_graph()).prepare()


def test_a_circle_is_seen():
    graph = {**file_graph(), "rlhf_cluster.errors": {"rlhf_cluster.pipeline"}}
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def imports_torch(path: Path) -> bool:
    top = ast.parse(path.read_text()).body
    return any(
        name.split(".")[0] == "torch"
        for node in top
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    )


def test_torch_is_not_imported_by_rooms_that_must_start_without_it():
    rooms, exceptions = TABLE["torch"]["rooms_without"], TABLE["torch"]["exceptions"]
    wrong = {m for m, p in PATHS.items() if room_of(m) in rooms and imports_torch(p)}
    assert wrong == set(exceptions)
