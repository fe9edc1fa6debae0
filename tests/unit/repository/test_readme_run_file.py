"""The run file of the README is one that `validate` accepts, with data, model and its reward beside."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.sections.every_run import (
    BpeTokenizer,
    ModelInit,
)

REPOSITORY = Path(__file__).parents[3]
README = Path("README.md").read_text()
FILES = re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL)
REWARDS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_run_file_of_the_readme_is_valid(tmp_path: Path):
    assert len(FILES) == 1
    assert len(REWARDS) == 1
    assert REWARDS[0].startswith("# my_rewards.py,")
    rows = [{"prompt": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(40)]
    data = tmp_path / "data/train.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = BpeTokenizer(path=str(data), vocab_size=512)
    init = ModelInit(hidden_size=64, num_layers=1, num_heads=2, tokenizer=tokenizer)
    make_model(init.model_copy(update={"max_position": 1024}), tmp_path / "models/my-model", 0)
    (tmp_path / "my_rewards.py").write_text(REWARDS[0])
    (tmp_path / "run.toml").write_text(FILES[0])
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_cluster.cli", "validate", "run.toml"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run.toml: valid" in done.stdout


def test_the_reward_of_the_readme_prefers_the_shorter_answer(tmp_path: Path):
    (tmp_path / "my_rewards.py").write_text(REWARDS[0])
    brevity = runpy.run_path(str(tmp_path / "my_rewards.py"))["brevity"]
    short, long = brevity(["?", "?"], ["4", "four"], answer=["4", "4"])
    assert long < short
