"""A stage of two members that is killed in the second, and the same command again: real Ray."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_cluster.run.checkpoint.checkpoint_folder import newest
from tests.support.builders.offline_stages import write_rows

STEPS = 60


def sections(tmp_path: Path) -> dict[str, dict[str, Any]]:
    rows = [
        {"prompt": f"{n:04}=", "chosen": f"{n % 10}1", "rejected": f"{n % 10}9"} for n in range(256)
    ]
    return {
        "run": {"name": "rm", "steps": STEPS, "units_per_step": 16},
        "stage": {"type": "reward_model", "members": 2, "split": "bootstrap"},
        "data": {
            "sources": [{"path": write_rows(tmp_path / "pairs.jsonl", rows)}],
            "max_tokens": 16,
            "held_out": 0.2,
        },
        "learner": {"learning_rate": 1e-2, "dtype": "float32", "num_cpus": 0.25},
        "checkpoint": {"every": 5, "keep": 1},
    }


def test_a_killed_ensemble_goes_on_with_the_member_that_is_missing(start_stage, tmp_path):
    killed = start_stage(**sections(tmp_path))
    first, second = (replace(killed, path=killed.path / f"rm-{k}") for k in range(2))
    second.wait_for(
        lambda s: s.checkpoint is not None and s.step > s.checkpoint, "a checkpoint", 400
    )
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    done = (first.path / "final" / "model.safetensors").read_bytes()
    assert (first.path / "held_out.json").exists()
    assert not (killed.path / "report.json").exists()
    step = newest(second.path / "checkpoints").checkpoint.state.step

    again = start_stage(**sections(tmp_path))
    code, output = again.finish(400)
    assert code == 0, output
    assert "Run rm-0 has finished" in output
    assert f"Run rm-1 continues from its checkpoint of step {step}" in output
    assert (first.path / "final" / "model.safetensors").read_bytes() == done
    assert (second.path / "final" / "model.safetensors").read_bytes() != done
    report = json.loads((again.path / "report.json").read_text())
    assert len(report["members"]) == 2
    assert report["ensemble"]["num_pairs"] == len(
        json.loads((first.path / "held_out.json").read_text())["units"]
    )
    assert report["ensemble"]["accuracy"] > 0.9
    summary = json.loads((second.path / "summary.json").read_text())
    assert summary["report"]["ensemble"] == report["ensemble"]
    assert "of all members" in output
    seeds = [
        json.loads((m.path / "resolved.json").read_text())["run"]["seed"] for m in (first, second)
    ]
    assert seeds[0] != seeds[1]
