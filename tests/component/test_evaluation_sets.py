"""The example of docs/evaluation.md, killed and resumed: real Ray, a scripted engine."""

from __future__ import annotations

import json
import signal
from collections import Counter
from typing import Any

from tests.support.builders.evaluation_example import examples

STEPS = 8
SECTIONS: dict[str, dict[str, Any]] = {
    "staleness": {"max_staleness": 0, "pipeline_depth": 0},
    "checkpoint": {"every": 2},
    **examples()[0],
}


def test_a_killed_run_goes_on_with_its_held_out_curve_and_repeats_and_loses_no_point(start_run):
    settings = {"name": "curves", "steps": STEPS, "groups_per_step": 4}
    run = start_run(run=settings, **SECTIONS)
    run.script(generate_delay_s=0.2, skill=0.0, skill_per_version=0.2)
    run.wait_for(
        lambda s: s.checkpoint is not None and s.checkpoint >= 2 and s.step > s.checkpoint,
        "a step after a checkpoint",
        timeout_s=300,
    )
    run.process.send_signal(signal.SIGKILL)
    run.process.wait(30)
    run.script(skill=0.0, skill_per_version=0.2)
    again = start_run(run=settings, **SECTIONS)
    code, output = again.finish(300)
    assert code == 0, output

    lines = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    for name, steps in (("curve", [0, 2, 4, 6, 8]), ("sampled", [3, 6, 8])):
        points = Counter(r["step"] for r in lines if f"evaluation/set_version/{name}" in r)
        assert points == dict.fromkeys(steps, 1), f"{name}: each point once"
    assert not any("evaluation/set_skipped_total" in key for r in lines for key in r)

    records = {r["step"]: r for r in again.metrics()}
    curve = {
        s: r["evaluation/reward_mean"] for s, r in records.items() if "evaluation/reward_mean" in r
    }
    assert list(curve) == [0, 2, 4, 6, 8]
    assert curve[8] > curve[0], "the scripted engine learns"
    for step in curve:
        assert records[step]["evaluation/set_version/curve"] == step
        assert records[step]["evaluation/set_answers/curve"] == 16
        assert records[step]["evaluation/set_reward_mean/curve"] == curve[step]
        assert records[step]["evaluation/set_lag_steps/curve"] >= 0
    assert records[3]["evaluation/set_answers/sampled"] == 6
    assert "learner/loss" in records[3], "a point stands with the training step of its version"
    summary = json.loads((run.path / "summary.json").read_text())
    assert (summary["reward_before"], summary["reward_after"]) == (curve[0], curve[8])
