"""Committed results say which code they measured."""

import json
import re
import tempfile
import warnings
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.listing import AIMS, MEASURED, RESULTS, ROOT, code_hash, code_of, is_old, missed


def test_every_result_names_the_code_that_it_measured_and_older_ones_are_listed():
    old = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text())
        assert len(result["code"]["hash"]) == 32, path
        assert result["code"]["measured"], path
        if is_old(path.stem, result):
            old.append(path.stem)
    if old:
        warnings.warn(f"results that are older than their code: {', '.join(old)}", stacklevel=1)


MACHINE_PATH = re.compile(r"(?<![\w./:-])/(?:home|root|work|tmp|mnt|Users|var|opt|scratch)/\S+")


def test_no_result_names_a_path_of_the_machine_that_made_it():
    found = {
        path.name: MACHINE_PATH.findall(path.read_text())
        for path in sorted(RESULTS.rglob("*"))
        if path.suffix in (".json", ".jsonl", ".md", ".csv", ".svg")
    }
    assert {name: paths for name, paths in found.items() if paths} == {}


def test_a_result_is_written_without_the_paths_of_this_machine(tmp_path: Path):
    folder = tempfile.mkdtemp()
    written = harness.without_machine_paths(f"python {ROOT.absolute()}/tests/x.py {folder}/clone")
    assert written == "python tests/x.py TMP/clone"


def test_what_is_measured_is_there():
    for name, measured in MEASURED.items():
        assert all((ROOT / path).exists() for path in measured), name
    known = {path.stem for path in RESULTS.glob("*.json")}
    assert set(AIMS) | set(MEASURED) <= known


def test_the_hash_follows_the_files_that_are_measured_and_no_others(tmp_path: Path):
    def write(name: str, text: str) -> str:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        return code_hash(tmp_path, ["room", "beside.py"])

    first = write("room/a.py", "1")
    assert write("other/b.py", "2") == first
    assert write("room/notes.md", "2") == first
    changed = write("room/a.py", "3")
    assert len({first, changed, write("room/b.py", "1"), write("beside.py", "")}) == 4
    assert code_of("verifiers")["measured"][0] == "rlhf_cluster/rewards"
    assert is_old("verifiers", {})
    assert not is_old("verifiers", {"code": code_of("verifiers")})


def test_a_missed_aim_and_a_missing_figure_are_named():
    aims = {"ratio": ("<=", 1.3), "accuracy": (">=", 0.999), "gone": ("<=", 0)}
    assert missed({"ratio": 1.31, "accuracy": 0.9, "x": 0}, aims) == [
        "ratio = 1.31, aim <= 1.3",
        "accuracy = 0.9, aim >= 0.999",
        "gone is missing",
    ]
    assert missed({"ratio": 1.3, "accuracy": 0.999, "gone": 0}, aims) == []


def test_a_result_is_written_with_the_hash_of_its_code(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    path = harness.write_result("scale", {"ratio": 1.0}, [])
    assert json.loads(path.read_text())["code"] == code_of("scale")
