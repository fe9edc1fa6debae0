"""The rules of the house that a machine can hold."""

import ast
from pathlib import Path

CORE = sorted(Path("rlhf_cluster").rglob("*.py"))
ACTORS = sorted(Path("actors").rglob("*.py"))
BESIDE = sorted(p for folder in ("tests", "benchmarks") for p in Path(folder).rglob("*.py"))
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def test_the_core_imports_neither_ray_nor_vllm_nor_the_actors():
    others = [path for path in CORE if path.parts[1] != "cli"]
    found = {str(path): imported_modules(path) & {"ray", "vllm", "actors"} for path in others}
    assert not {path: names for path, names in found.items() if names}


def test_the_command_line_reaches_the_actors_only_inside_its_commands():
    tree = ast.parse(Path("rlhf_cluster/cli/commands.py").read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("actors" in ast.unparse(node) for node in top)


def test_files_and_functions_stay_small_and_every_module_says_what_it_promises():
    wrong = []
    for path in CORE + ACTORS + BESIDE:
        if (lines := path.read_text().count("\n")) > MAX_FILE_LINES:
            wrong.append(f"{path}: {lines} lines")
    for path in CORE + ACTORS:
        text = path.read_text()
        tree = ast.parse(text)
        if not ast.get_docstring(tree):
            wrong.append(f"{path}: no docstring")
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{path}:{node.lineno} {node.name}: {length} lines")
    assert not wrong
