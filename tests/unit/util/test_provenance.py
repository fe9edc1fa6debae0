"""Whether driver and actors run the same code, and the code of this project."""

import os
import pickle
import subprocess
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

import pytest

from rlhf_cluster.errors import RunError
from rlhf_cluster.util.provenance import (
    CODE,
    DIGEST_VARIABLE,
    check_actors,
    check_same_code,
    code_digest,
)


def test_n17_a_node_with_other_code_is_refused_by_name():
    check_same_code({}, "node 10.0.0.7")  # started by nobody who says what it has
    check_same_code({DIGEST_VARIABLE: code_digest()}, "node 10.0.0.7")
    with pytest.raises(
        RunError, match=r"node 10\.0\.0\.7 has other code .*same checkout"
    ) as caught:
        check_same_code({DIGEST_VARIABLE: "0123456789abcdef"}, "node 10.0.0.7")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def package_of(folder: Path) -> ModuleSpec | None:
    """Return what Python finds of the name `actors` in `folder`, without importing it."""
    return PathFinder.find_spec("actors", [str(folder)])


def test_a_package_that_hides_our_actors_is_refused_with_both_places(tmp_path):
    check_actors(package_of(CODE))
    other = tmp_path / "other" / "actors" / "__init__.py"
    other.parent.mkdir(parents=True)
    other.write_text("raise AssertionError('imported')")
    with pytest.raises(RunError) as caught:
        check_actors(package_of(tmp_path / "other"))
    assert f"at {other}, " in str(caught.value)
    assert f"rlhf-cluster is {CODE / 'actors' / '__init__.py'}." in str(caught.value)
    (tmp_path / "bare" / "actors").mkdir(parents=True)
    for nothing in (package_of(tmp_path / "bare"), None):
        with pytest.raises(RunError, match="at no place, "):
            check_actors(nothing)


def test_no_command_starts_with_other_actors_on_the_path(tmp_path):
    other = tmp_path / "actors" / "__init__.py"
    other.parent.mkdir()
    other.write_text("")
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_cluster.cli", "plan", "configs/quickstart.toml"],
        env={**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": f"{tmp_path}:{CODE}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: Python finds the package `actors` at ")
    assert str(other) in done.stderr
