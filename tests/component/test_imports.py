"""What is loaded by importing a module, each in a process of its own."""

import subprocess
import sys

import pytest

LIGHT = {
    "rlhf_cluster.config, rlhf_cluster.pipeline": "torch ray vllm transformers pyarrow",
    "rlhf_cluster.algorithms": "torch",
    "rlhf_cluster.rewards": "torch transformers",
    "rlhf_cluster.scoring.scoring_worker": "torch transformers",
    "rlhf_cluster.scoring.moving_reference": "torch",
    "rlhf_cluster.generation.generation_worker": "torch vllm ray transformers",
    "actors.vllm.vllm_engine, tests.support.engines.scripted_engine": "torch vllm ray transformers",
}


def printed(code: str, *arguments: str) -> str:
    """The last line that `code` prints in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("modules", LIGHT)
def test_importing_loads_nothing_heavy(modules: str) -> None:
    code = (
        f"import sys, {modules}; print([m for m in {LIGHT[modules].split()} if m in sys.modules])"
    )
    assert printed(code) == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "--help"]])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    heavy = ["torch", "ray", "transformers", "vllm", "numpy", "pyarrow", "matplotlib"]
    code = (
        "import sys; from rlhf_cluster.cli import main; assert main(sys.argv[1:]) == 0; "
        f"print([m for m in {heavy} if m in sys.modules])"
    )
    assert printed(code, *arguments) == "[]"


def test_the_whole_core_imports_without_ray_vllm_flash_attention_or_cuda() -> None:
    code = """
import importlib, pkgutil, sys
for blocked in ("ray", "vllm", "flash_attn", "deepspeed"):
    sys.modules[blocked] = None
import rlhf_cluster
for module in pkgutil.walk_packages(rlhf_cluster.__path__, "rlhf_cluster."):
    if not module.name.endswith("programs.function_child"):
        importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized()
print("ok")
"""
    assert printed(code) == "ok"
