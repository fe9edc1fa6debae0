"""A generation and a scoring worker are stopped, as on a machine that swaps: they neither answer nor
end. Real Ray, a scripted engine."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

from tests.component.test_learner_loss import pids

STEPS, GROUPS = 6, 4


def test_workers_that_are_silent_are_replaced_and_every_group_is_trained_once(start_run):
    run = start_run(
        run={"steps": STEPS, "groups_per_step": GROUPS},
        generation={"workers": 2},
        scoring={"workers": 2},
        cluster={"heartbeat_timeout_s": 10.0},
    )
    run.script(generate_delay_s=0.3)
    run.wait_for(lambda s: s.step >= 1, "a step", 300)
    silent = [pids(kind)[0] for kind in ("GenerationActor", "ScoringActor")]
    for pid in silent:
        os.kill(pid, signal.SIGSTOP)
    code, output = run.finish(300)
    assert code == 0, output
    for kind in ("generation", "scoring"):
        assert re.search(rf"{kind}-\d.health: no answer within 11.5 s", output)
        name = f"pool/restarts_total/{kind}"
        assert max(r.get(name, 0) for r in run.metrics()) == 1
    rows = run.trained()
    assert len(rows) == STEPS * GROUPS * 4
    assert {group for group, *_ in rows} == {f"g{n:08d}" for n in range(STEPS * GROUPS)}
    assert not [pid for pid in silent if Path(f"/proc/{pid}").exists()], "ended, not left behind"
