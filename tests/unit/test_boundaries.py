"""The rules of the house that a machine can hold."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CORE = sorted(Path("rlhf_cluster").rglob("*.py"))
ACTORS = sorted(Path("actors").rglob("*.py"))
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def imported_modules(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", CORE, ids=str)
def test_the_core_imports_neither_ray_nor_vllm_nor_the_actors(path):
    assert not imported_modules(path) & {"ray", "vllm", "actors"} or path.name == "cli.py"


def test_the_command_line_reaches_the_actors_only_inside_its_commands():
    tree = ast.parse(Path("rlhf_cluster/cli.py").read_text())
    top = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    assert not any("actors" in ast.unparse(node) for node in top)


@pytest.mark.parametrize("path", CORE + ACTORS, ids=str)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= MAX_FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{path}:{node.lineno} {node.name}"


@pytest.mark.parametrize("path", CORE + ACTORS, ids=str)
def test_every_module_says_what_it_promises(path):
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_the_whole_core_imports_without_ray_vllm_flash_attention_or_cuda():
    code = """
import importlib, pkgutil, sys
for blocked in ("ray", "vllm", "flash_attn", "deepspeed"):
    sys.modules[blocked] = None
import rlhf_cluster
for module in pkgutil.walk_packages(rlhf_cluster.__path__, "rlhf_cluster."):
    if not module.name.endswith("rewards.child"):
        importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized()
print("ok")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "ok", done.stderr
