"""Under a run that goes on the control actor and the buffer are killed and a rank is stopped: real Ray,
a scripted engine."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.util.state import list_actors

from actors.services.control_actor import scale
from rlhf_cluster.weights import store

STEPS = 8
SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"steps": STEPS, "groups_per_step": 4},
    "learner": {"ranks": 2},
    "staleness": {"max_staleness": 0, "pipeline_depth": 0},
    "checkpoint": {"every": 2, "keep": 2},
    "sft": {"steps": 2, "batch_size": 8},
    "algorithm": {"type": "grpo", "group_size": 4, "kl_coef": 0.01},
    "scoring": {"reference": True},
    "cluster": {"heartbeat_timeout_s": 30.0},
}


def pids(kind: str) -> list[int]:
    """Process ids of the live actors of a class."""
    actors = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("state", "=", "ALIVE"), ("class_name", "=", kind)],
        detail=True,
    )
    return sorted(actor.pid for actor in actors)


def test_a_run_goes_on_after_the_silence_of_a_rank_and_the_loss_of_the_buffer(start_run):
    run = start_run(**SECTIONS)
    run.script(generate_delay_s=0.5)
    run.wait_for(lambda s: s.checkpoint is not None and s.step > s.checkpoint, "a checkpoint", 300)
    run.script(hang_generate=True)
    workers = [pids(kind) for kind in ("GenerationActor", "ScoringActor")]
    [control] = pids("ControlActor")
    os.kill(control, signal.SIGKILL)
    run.wait_for(
        lambda s: any("another control channel is open, restart 1" in e.text for e in s.events),
        "the run has a control channel again",
        300,
    )
    assert scale(run.path, {"scoring": 1}, None) == {"scoring": "scoring: 1 workers"}
    ranks = pids("RankActor")
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGSTOP)  # as on a machine that swaps: it neither answers nor ends
    status = run.wait_for(lambda s: s.restarts == 1, "the silence was noticed", 300)
    run.script(generate_delay_s=0.5)
    run.wait_for(lambda s: s.restarts == 1 and s.state == "running", "going on", 300)
    run.script(hang_generate=True)
    assert not set(pids("RankActor")) & set(ranks), "the survivor was ended with it"
    assert any("the run goes on from its checkpoint of step" in e.text for e in status.events)
    os.kill(pids("BufferActor")[0], signal.SIGKILL)
    run.wait_for(lambda s: s.restarts == 2, "the second loss was noticed", 300)
    assert [pids(kind) for kind in ("GenerationActor", "ScoringActor")] == workers, "they stayed"
    run.script()
    code, output = run.finish(300)
    assert code == 0, output

    records = [r for r in run.metrics() if "learner/loss" in r]
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    assert records[-1]["learner/restarts_total"] == 2
    assert records[-1]["control/restarts_total"] == 1
    assert records[-1]["learner/ranks"] == 2
    rows = run.trained()
    assert len(rows) == STEPS * 4 * 4
    assert {group for group, *_ in rows} == {f"g{n:08d}" for n in range(STEPS * 4)}
    straight = start_run(**SECTIONS)
    code, output = straight.finish(300)
    assert code == 0, output
    assert rows == straight.trained()
    digests = {store.latest(each.path / "weights").digest for each in (run, straight)}
    assert len(digests) == 1, "the same weights, to the bit"
    assert not pids("RankActor"), "nothing of the runs is left on the cluster"
    assert not Path(f"/proc/{ranks[1]}").exists()


def test_a_loss_before_the_first_checkpoint_begins_the_run_anew_with_the_same_pools(start_run):
    """Asynchronous, with what workers and the cluster keep by version: none of it is used again."""
    run = start_run(
        run={"steps": 5, "groups_per_step": 4},
        checkpoint={"every": 50},
        sft={"steps": 2, "batch_size": 8},
        scoring={"reference": True, "exact_logprobs": True},
        algorithm={"type": "grpo", "group_size": 4, "kl_coef": 0.01},
        weights={"transport": "relay"},
        generation={"workers": 2},
    )
    run.script(generate_delay_s=0.5)
    run.wait_for(lambda s: s.step >= 2, "two steps", 300)
    run.script(hang_generate=True)
    workers = [pids(kind) for kind in ("GenerationActor", "ScoringActor")]
    os.kill(pids("RankActor")[0], signal.SIGKILL)
    status = run.wait_for(lambda s: s.restarts == 1, "the loss was noticed", 300)
    assert any(
        "the run goes on from the beginning, restart 1 of 3" in e.text for e in status.events
    )
    assert [pids(kind) for kind in ("GenerationActor", "ScoringActor")] == workers, "they stayed"
    run.script()
    code, output = run.finish(300)
    assert code == 0, output
    assert [r["step"] for r in run.metrics() if "learner/loss" in r] == [1, 2, 3, 4, 5]
    rows = run.trained()
    assert len(rows) == 5 * 4 * 4
    assert {group for group, *_ in rows} == {f"g{n:08d}" for n in range(5 * 4)}
