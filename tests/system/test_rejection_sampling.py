"""Rejection sampling fine-tuning with vLLM: the shipped pipeline, from its first stage to its last."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cluster.data.rows import read_rows


@pytest.mark.timeout(900)
def test_a_model_gets_better_by_its_own_right_answers(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "rlhf_cluster.cli", "run", "configs/rft_cpu.toml"),
            *("--set", f"pipeline.root={tmp_path}"),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=840,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "rft-cpu"
    samples, result = (
        json.loads((folder / name / "report.json").read_text()) for name in ("samples", "result")
    )
    rows = read_rows(folder / "samples" / "data.jsonl")
    assert len(rows) == samples["rows"]
    assert samples["selected_reward_mean"] == 1.0
    assert samples["reward_mean"] < 0.6, "there was room to learn"
    assert result["reward_mean"] > samples["reward_mean"] + 0.1
