"""A run that is killed or stopped, and the same command again: real Ray, a scripted engine."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.run.checkpoint.checkpoint_folder import newest
from rlhf_cluster.weights import store

STEPS = 8
SYNCHRONOUS = {"max_staleness": 0, "pipeline_depth": 0}
SECTIONS: dict[str, dict[str, Any]] = {
    "staleness": SYNCHRONOUS,
    "checkpoint": {"every": 2},
    "sft": {"steps": 3, "batch_size": 8},
    "algorithm": {"type": "grpo", "group_size": 4, "kl_coef": 0.01},
    "scoring": {"reference": True},
    "evaluation": {"num_prompts": 4},
}


def _stored(run: Any) -> set[int]:
    """The stored groups that a run going on from the newest checkpoint has no need to generate."""
    state = newest(run.path / "checkpoints").checkpoint.state
    store = ExperienceStore(run.path / "experience")
    admitted_at = {ticket.number: ticket.version for ticket in state.buffer.open}
    found = set()
    for number in store.numbers():
        if number in admitted_at or number >= state.buffer.admitted:
            oldest = store.read(number).summary().oldest_version
            newest_version = store.header(number).newest_version
            if newest_version <= state.step and oldest >= admitted_at.get(number, state.step):
                found.add(number)
    return found


def _start(start_run: Any, name: str, steps: int = STEPS, **sections: dict[str, Any]) -> Any:
    settings = {"name": name, "steps": steps, "groups_per_step": 4}
    return start_run(run=settings, **{**SECTIONS, **sections})


def test_s31_a_killed_driver_and_the_same_command_end_where_an_uninterrupted_run_ends(start_run):
    straight = _start(start_run, "straight")
    killed = _start(start_run, "killed")
    killed.script(generate_delay_s=0.2)
    killed.wait_for(
        lambda s: s.checkpoint is not None and s.checkpoint >= 2 and s.step > s.checkpoint,
        "a step after a checkpoint",
        timeout_s=300,
    )
    killed.process.send_signal(signal.SIGKILL)
    killed.process.wait(30)
    stored = _stored(killed)
    again = _start(start_run, "killed")
    code, output = again.finish(300)
    assert code == 0, output
    assert again.metrics()[-1]["buffer/recovered_total"] == len(stored)
    assert "Run killed continues from its checkpoint of step " in output
    assert "warmup" not in output
    code, output = straight.finish(300)
    assert code == 0, output

    digests = {store.latest(run.path / "weights").digest for run in (straight, again)}
    assert len(digests) == 1, "the same weights, to the bit"
    records = [r for r in again.metrics() if "learner/loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert again.trained() == straight.trained()
    assert len(again.trained()) == STEPS * 4 * 4
    summaries = [json.loads((r.path / "summary.json").read_text()) for r in (straight, again)]
    assert summaries[0]["reward_before"] == summaries[1]["reward_before"]
    assert summaries[0]["reward_after"] == summaries[1]["reward_after"]
    states = [newest(r.path / "checkpoints").checkpoint.state for r in (straight, again)]
    assert states[0].buffer == states[1].buffer
    assert states[0].learner == states[1].learner
    assert sorted(p.name for p in (again.path / "checkpoints").iterdir()) == [
        "step-000006",
        "step-000008",
    ]

    before = {p: p.stat().st_mtime_ns for p in again.path.rglob("*") if p.is_file()}
    finished = _start(start_run, "killed")
    assert finished.finish()[0] == 0
    assert {p: p.stat().st_mtime_ns for p in again.path.rglob("*") if p.is_file()} == before


def test_a_stopped_run_leaves_a_checkpoint_of_its_last_step_and_goes_on(start_run):
    sections = {"staleness": {}, "checkpoint": {"every": 0}}
    run = _start(start_run, "stopped", 12, **sections)
    run.script(generate_delay_s=0.2)
    run.wait_for(lambda s: s.state == "running" and s.step >= 3, "three steps", timeout_s=300)
    os.kill(run.process.pid, signal.SIGTERM)
    code, output = run.finish()
    assert code == 1
    status = json.loads((run.path / "status.json").read_text())
    assert status["state"] == "stopped"
    assert status["checkpoint"] == status["step"] >= 3
    assert f"The same command continues it from step {status['step']}" in output
    run.script()

    changed = {**sections, "learner": {"learning_rate": 5e-4}}
    refused = _start(start_run, "stopped", 12, **changed)
    code, output = refused.finish()
    assert code == 1
    assert "learner.learning_rate = 0.0005, was 0.001" in output
    assert "--accept-changes" in output

    stored = _stored(run)
    again = _start(start_run, "stopped", 12, **sections)
    code, output = again.finish()
    assert code == 0, output
    assert again.metrics()[-1]["buffer/recovered_total"] == len(stored)
    left = ExperienceStore(run.path / "experience").numbers()
    assert min(left) == 4 * status["step"], "of what was trained before the checkpoint all is gone"
    trained = again.trained()
    groups = sorted({group for group, *_ in trained})
    assert groups == [f"g{n:08d}" for n in range(12 * 4)], "every group once, and no other"
    assert len(trained) == 12 * 4 * 4
    records = [r for r in again.metrics() if "learner/loss" in r]
    assert [r["step"] for r in records] == list(range(1, 13))
    assert all(r["staleness/max"] <= 1 for r in records)
