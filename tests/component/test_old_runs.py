"""Runs that an earlier commit left behind resume with today's code.

`old_runs/make.py` makes the archives; add one in the commit that changes a format of a run directory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import tomli_w

from rlhf_cluster.run.checkpoint.checkpoint_folder import newest
from tests.component.old_runs.make import NAME, ROOT, STEPS, TEXT, TREE

REPOSITORY = Path(__file__).parents[2]
ARCHIVES = sorted((Path(__file__).parent / "old_runs").glob("*.tar.xz"))


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack a run below `folder`, as if it had been made there."""
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    run = folder / NAME
    for path in run.rglob("*"):
        if path.suffix in TEXT:
            content = path.read_bytes()
            path.write_bytes(content.replace(ROOT.encode(), str(folder.absolute()).encode()))
    return run


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_a_run_of_an_earlier_commit_resumes(archive: Path, tmp_path: Path, ray_address: str):
    run = unpack(archive, tmp_path)
    (tmp_path / "run.toml").write_text(tomli_w.dumps(TREE))
    lines_before = (run / "metrics.jsonl").read_text().splitlines()
    engine = "tests.support.engines.scripted_engine:make_engine"
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.engines.run_with_engine", "run.toml", engine],
        cwd=tmp_path,
        env={**os.environ, "RAY_ADDRESS": ray_address, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Run old continues from its checkpoint of step 2" in done.stdout
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "learner/loss" in r] == list(range(1, STEPS + 1))
    kept = [line for line in lines_before if json.loads(line)["step"] <= 2]
    assert (run / "metrics.jsonl").read_text().splitlines()[: len(kept)] == kept
    assert records[-1]["buffer/recovered_total"] == 2, "the two groups of step 3 are on disk"
    checkpoint = newest(run / "checkpoints").checkpoint
    assert checkpoint is not None
    assert checkpoint.state.step == STEPS
