"""The directory of a run with all that reports and traces read: metrics, samples, groups, logs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from rlhf_cluster.buffer.group_recovery import Recovery
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.observe.record.run_log import RunLog
from rlhf_cluster.observe.record.samples import write_samples
from rlhf_cluster.records import ExperienceGroup, Prompt, Ticket
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Event, Pool, Snapshot
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.services import make_group, make_prompt

START_S = 1_700_000_000.0
GROUPS = 2
RECOVERY = {"every": 0, "span": 1, "look_ahead": 1, "keep_steps": 2, "step": None}
LOG = """\
2023-11-14T22:13:20.000Z INFO controller controller actors.drivers.run_observer: starting
2023-11-14T22:13:21.000Z INFO controller controller actors.drivers.rl_observer: step 1: reward 0.5, 1 s
2023-11-14T22:13:22.000Z INFO controller controller actors.drivers.run_observer: generation-1 died: {hostile}
2023-11-14T22:13:23.000Z INFO controller controller rlhf_cluster.run.worker_pool: not an event
"""  # noqa: E501


def group(number: int, prompt: str) -> ExperienceGroup:
    """Of ticket `number`, trained at step `number // 2 + 1`, sampled one version before that."""
    version = max(0, number // GROUPS - 1)
    ticket, made = Ticket(number=number, version=version), make_prompt(number)
    hostile = Prompt(prompt_id=made.prompt_id, token_ids=made.token_ids, source=prompt)
    whole = make_group(ticket, hostile, [0.0, number / 10], version)
    scored = tuple(
        replace(
            s,
            ref_logprobs=np.full(len(s.rollout.response_ids), -0.75, dtype=np.float32),
            rollout=replace(
                s.rollout,
                worker=f"generation-{number % 2}",
                started_s=START_S + number,
                finished_s=START_S + number + 1.5,
            ),
        )
        for s in whole.scored
    )
    return replace(whole, scored=scored)


def record_run(
    root: Path, name: str = "recorded", steps: int = 6, hostile: str = "plain", **settings: dict
) -> Path:
    """A run that is over, of `steps` steps with `GROUPS` groups each. `hostile` stands in its prompts,
    responses, events and errors."""
    path = root / name
    config = tiny_config(
        **{
            **settings,
            "run": {"root": str(root), "name": name, "steps": steps, "groups_per_step": GROUPS},
        }
    )
    with RunDir.create(path, config) as run:
        store = ExperienceStore(path / "experience")
        recovery = Recovery(store, path / "checkpoints", tell=print, **RECOVERY)
        with RunLog(run) as log:
            log.append(0, START_S, {"evaluation/reward_mean": 0.25, "evaluation/num_prompts": 4.0})
            for step in range(1, steps + 1):
                groups = [group((step - 1) * GROUPS + i, hostile) for i in range(GROUPS)]
                for each in groups:
                    store.write(each)
                log.append(step, START_S + 2.0 * step, metrics(step))
                write_samples(run.samples, step, groups, step - 1, lambda ids: hostile, limit=3)
                recovery.record_trained(step, [each.ticket.number for each in groups])
            store.write(group(steps * GROUPS, hostile))  # finished, and not trained
        (run.logs / "controller.log").write_text(LOG.format(hostile=hostile.replace("\n", " ")))
        run.write_status(
            Snapshot(
                run=name,
                state="failed",
                step=steps,
                num_steps=steps + 2,
                time_s=START_S + 100,
                elapsed_s=100.0,
                step_s=2.0,
                learner_wait_s=1.0,
                generation_wait_s=0.0,
                pools=(Pool(name="generation", alive=1, wanted=2),),
                events=(Event(time_s=START_S, text=hostile),),
                error=hostile,
            )
        )
    return path


def metrics(step: int) -> dict[str, float]:
    return {
        "reward/mean": step / 10,
        "staleness/max": float(min(step - 1, 1)),
        "staleness/mean": 0.5,
        "learner/entropy": 1.0 - step / 100,
        "response/length_mean_tokens": 4.0,
        "time/step_s": 2.0,
        "time/learner_wait_s": 1.0,
        "time/generation_wait_s": 0.0,
        "time/train_s": 0.75,
        "time/publish_wait_s": 0.25,
        "time/generation_busy_s": 2.0,
        "time/scoring_busy_s": 0.5,
        "pool/size/generation": 2.0,
        "pool/size/scoring": 1.0,
        "weights/publish_s": 0.5,
        "weights/pull_s": 0.25,
        "weights/version_live": float(step - 1),
    }
