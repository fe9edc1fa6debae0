"""The first job of a new user, on a cluster that has just been started by the full path of `ray`, where
`python` on the PATH is none that could run it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import tomli_w

from rlhf_cluster.cli.commands import main
from tests.support.builders.run_configs import tiny_tree
from tests.support.servers.job_cluster import (
    started_head,
    wait_until,
)

ENDS_S = 120.0
ERROR = "error: task sort_digits: 256 of 256 prompts are longer than data.max_prompt_tokens = 3"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def path_of_others(tmp_path: Path) -> str:
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho another python\nexit 1\n")
    python.chmod(0o755)
    return f"{python.parent}:/usr/bin:/bin"


@pytest.fixture
def submit(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Send a run that ends with `ERROR`, its first own word, to the dashboard at an address."""
    config = tmp_path / "run.toml"
    config.write_text(tomli_w.dumps(tiny_tree(run={"name": "first", "root": str(tmp_path)})))
    words = ["submit", str(config), "--set", "data.max_prompt_tokens=3", "--address"]
    yield lambda address: main([*words, address])
    assert not (tmp_path / "first").exists(), "it fails before there is a run directory"


def test_a_job_runs_with_the_python_of_the_clusters_ray_and_its_status_ends_with_its_log(
    path_of_others, submit, capsys
):
    def status() -> str:
        assert main(["status", "first", "--address", address]) == 0
        return capsys.readouterr().out

    with started_head({"PATH": path_of_others}) as address:
        assert submit(address) == 0, capsys.readouterr().err
        wait_until(lambda: "FAILED" in status(), "the end of the job", ENDS_S)
        row, title, *log = status().partition("  ended ")[2].splitlines()
        assert row.endswith(" UTC")
        assert title == "  the end of its log:"
        assert log[-1].startswith(f"  {ERROR}")
        assert main(["logs", "first", "--address", address, "--tail", "1"]) == 0
        assert capsys.readouterr().out.startswith(ERROR)


def test_a_cluster_whose_python_lacks_a_package_gets_no_job(
    path_of_others, submit, tmp_path, capsys
):
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\")\n")
    with started_head({"PATH": path_of_others, "PYTHONPATH": str(lacking)}) as address:
        assert submit(address) == 1
        error = capsys.readouterr().err
        assert "this project cannot run: ModuleNotFoundError: No module named 'typer'" in error
        assert "Start Ray on every node" in error
        assert main(["status", "first", "--address", address]) == 1
        assert "no job with this id or run name" in capsys.readouterr().err
