"""An offline stage that is killed, and the same command again: real Ray, two ranks."""

from __future__ import annotations

import json
import signal
from typing import Any

from rlhf_cluster.observe.report.learning_curve import held_out_name
from rlhf_cluster.run.checkpoint.checkpoint_folder import newest

STEPS = 150
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"name": "killed", "steps": STEPS, "units_per_step": 16, "evaluate_every": 50},
    "data": {
        "sources": [{"task": "sort_digits", "limit": 512}],
        "max_tokens": 16,
        "held_out": 0.05,
    },
    "learner": {"ranks": 2, "learning_rate": 3e-3, "dtype": "float32", "num_cpus": 0.25},
    "checkpoint": {"every": 10, "keep": 1},
}


def test_a_killed_stage_and_the_same_command_train_every_step_once(start_stage):
    killed = start_stage(**SECTIONS)
    killed.wait_for(
        lambda s: s.checkpoint is not None and s.step > s.checkpoint, "a checkpoint", 300
    )
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    step = newest(killed.path / "checkpoints").checkpoint.state.step
    assert 10 <= step < STEPS

    again = start_stage(**SECTIONS)
    code, output = again.finish(400)
    assert code == 0, output
    assert f"Run killed continues from its checkpoint of step {step}" in output
    records = [r for r in again.metrics() if "stage/loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["sft/loss"] < 0.6 * records[0]["sft/loss"]
    held_out = {r["step"] for r in again.metrics() if held_out_name("sft/loss") in r}
    assert held_out == {0, 50, 100, STEPS}
    summary = json.loads((again.path / "summary.json").read_text())
    assert summary["after"] < 0.6 * summary["before"]
    assert (again.path / "curve.png").stat().st_size > 0

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(again.path / "final")
    assert len(AutoTokenizer.from_pretrained(again.path / "final")) == model.config.vocab_size

    code, output = start_stage(**SECTIONS).finish(120)
    assert code == 0, output
    assert "Run killed has finished" in output
