"""The run file of the README is one that `validate` accepts, with data, model and reward beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.sections.every_run import (
    BpeTokenizer,
    ModelInit,
)

REPOSITORY = Path(__file__).parents[3]
FILES = re.findall(r"```toml\n(.*?)```", Path("README.md").read_text(), flags=re.DOTALL)
SIGNATURE = re.findall(r"`(def brevity\(.*?\) -> .*?)`", Path("README.md").read_text())


def test_the_run_file_of_the_readme_is_valid(tmp_path: Path):
    assert len(FILES) == 1
    assert len(SIGNATURE) == 1
    rows = [{"prompt": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(40)]
    data = tmp_path / "data/train.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = BpeTokenizer(path=str(data), vocab_size=512)
    init = ModelInit(hidden_size=64, num_layers=1, num_heads=2, tokenizer=tokenizer)
    make_model(init.model_copy(update={"max_position": 1024}), tmp_path / "models/my-model", 0)
    reward = f"{SIGNATURE[0]}:\n    return [-len(text) / 1000 for text in completions]\n"
    (tmp_path / "my_rewards.py").write_text(reward)
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
