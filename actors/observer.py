"""The driver's eyes: from step reports and counters to metrics.jsonl, status.json and the screen.

Everything is written when it happens; nothing here waits for anything. The record of experience
itself (samples) is written by the learner, so that no rollout passes through the driver.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.metrics import RayMetrics
from actors.pool import WorkerPool
from rlhf_cluster.checkpoint import continuing
from rlhf_cluster.checkpoint.folder import Checkpoint
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.experience.buffer import BufferStats, buffer_metrics
from rlhf_cluster.observe import advisor, post_mortem
from rlhf_cluster.observe.metric import Role
from rlhf_cluster.observe.metrics import find
from rlhf_cluster.observe.parts import part_means
from rlhf_cluster.observe.run_log import RunLog, read_metrics
from rlhf_cluster.observe.sinks import open_sinks
from rlhf_cluster.observe.snapshot import Event, Pool, Snapshot, State
from rlhf_cluster.pipeline import StepTimes
from rlhf_cluster.ports import StepReport, Taken
from rlhf_cluster.records import GroupSummary, Ticket
from rlhf_cluster.rundir import RunDir
from rlhf_cluster.weights.sync import SyncStats

log = logging.getLogger(__name__)

MAX_EVENTS = 6
OWN_ROLES = (Role.CONTROLLER, Role.WEIGHTS)  # the others export their numbers themselves


class RunObserver:
    """Implements the pipeline's observer. `show` gets every new snapshot; `started_s` is the unix
    time at which the run was asked for; `further` gives metrics of services that the driver knows."""

    def __init__(
        self,
        config: RunConfig,
        rundir: RunDir,
        pools: Sequence[WorkerPool],
        sync: Callable[[], SyncStats],
        show: Callable[[Snapshot], None],
        started_s: float,
        clock: Callable[[], float] = time.time,
        further: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._rundir, self._pools, self._sync, self._show = rundir, pools, sync, show
        self._config = config
        self._clock, self._further = clock, further
        self._started_s = started_s
        self._num_steps, self._num_warmup_steps = config.run.steps, config.sft.steps
        self._log = RunLog(rundir, open_sinks(config, rundir.path, self.event))
        self._metrics = RayMetrics("controller", {"run": config.run.name})
        self._rewards: deque[float] = deque(maxlen=10)
        self._recent: deque[dict[str, float]] = deque(maxlen=advisor.WINDOW)
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._buffer: BufferStats | None = None
        self._num_recovered = 0
        self.advice: advisor.Advice | None = None  # of the last steps
        self.first_step_s: float | None = None
        self.snapshot = Snapshot(
            run=config.run.name,
            state="starting",
            step=0,
            num_steps=config.run.steps,
            time_s=self._started_s,
        )

    def step(self, report: StepReport, taken: Sequence[Taken], times: StepTimes) -> None:
        now = self._clock()
        if self.first_step_s is None:
            self.first_step_s = now - self._started_s
        values = {
            "staleness/pipeline_depth": float(self._config.staleness.pipeline_depth),
            **report.metrics,
            **group_metrics(taken, times),
            **self._counters(),
            "step/number": float(report.step),
            "staleness/bound": float(self._config.staleness.bound),
        }
        self._recent.append(values)
        advice = self.advice = advisor.advise(self._recent)
        values |= {} if advice is None else advice.metrics()
        self._log.append(report.step, now, values)
        self._metrics.record({k: v for k, v in values.items() if find(k).role in OWN_ROLES})
        self._rewards.append(values["reward/mean"])
        log.info("step %d: reward %.4g, %.3g s", report.step, values["reward/mean"], times.step_s)
        self._update(
            state="running",
            step=report.step,
            num_steps=self._num_steps,
            reward=values["reward/mean"],
            reward_mean10=float(np.mean(self._rewards)),
            staleness_mean=values.get("staleness/mean"),
            staleness_max=values.get("staleness/max"),
            response_length_tokens=values["response/length_mean_tokens"],
            tokens_per_s=values["step/tokens_per_s"],
            step_s=times.step_s,
            learner_wait_s=times.learner_wait_s,
            generation_wait_s=times.generation_wait_s,
            advice=None if advice is None else advice.text,
        )

    def num_workers(self, kind: str) -> int:
        """Live workers of a pool."""
        return sum(len(pool.live) for pool in self._pools if pool.kind == kind)

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None:
        self.event(f"group {ticket.group_id} discarded: {error}")

    def group_recovered(self, ticket: Ticket) -> None:
        self._num_recovered += 1
        log.info("group %s was on disk", ticket.group_id)

    def event(self, text: str) -> None:
        """Something worth telling: a restart, a discard, a scaling."""
        self._tell(text)

    def _tell(self, text: str, **changes: Any) -> None:
        log.info(text)
        self._events.append(Event(time_s=self._clock(), text=text))
        self._update(**changes)

    def state(self, state: State, error: str | None = None) -> None:
        log.info("%s%s", state, f": {error}" if error else "")
        steps = {"step": 0, "num_steps": self._num_steps} if self.snapshot.state == "warmup" else {}
        self._update(state=state, error=error, **steps)

    def post_mortem(self, error: BaseException) -> None:
        """Leave what is known of the run that `error` ends. Raises nothing."""

        def document() -> dict[str, Any]:
            return post_mortem.describe(
                time_s=self._clock(),
                run=self.snapshot.run,
                error=error,
                status=json.loads(self.snapshot.to_json()),
                services={
                    **{pool.kind: {"last_errors": pool.last_errors} for pool in self._pools},
                    "buffer": None if self._buffer is None else asdict(self._buffer),
                },
                logs=post_mortem.read_tails(self._rundir.logs),
                stacks=post_mortem.own_stacks(),
                config=self._config.model_dump(mode="json"),
                packages=json.loads(self._rundir.environment.read_text())["packages"],
                variables=os.environ,
            )

        post_mortem.write(self._rundir.path / post_mortem.NAME, document)

    def resumed(self, step: int) -> None:
        """The run goes on after `step` steps, which are in its record already."""
        self._read_rewards()
        self._update(step=step, checkpoint=step)
        self.event(f"continues from the checkpoint of step {step}")

    def recovering(self, lost: RlhfError, restart: int, limit: int, step: int | None) -> None:
        """Learner and buffer are lost: the run goes on from the checkpoint of `step`, or, where there
        is none, from the beginning."""
        where = "from the beginning" if step is None else f"from its checkpoint of step {step}"
        text = f"{lost}: the run goes on {where}, restart {restart} of {limit}"
        self._tell(text, state="recovering", restarts=restart)

    def cut_back(self, checkpoint: Checkpoint | None) -> None:
        """Take back what was told of the steps after `checkpoint`, or of all."""
        continuing.cut_back(self._rundir, checkpoint)
        self._log.reopen()
        self._rewards.clear()
        self._recent.clear()
        self.advice = None
        self._read_rewards()
        step = None if checkpoint is None else checkpoint.state.step
        self._update(step=step or 0, num_steps=self._num_steps, checkpoint=step)

    def _read_rewards(self) -> None:
        records = read_metrics(self._rundir.metrics)
        self._rewards.extend(r["reward/mean"] for r in records if r.get("reward/mean") is not None)

    def checkpointed(self, step: int) -> None:
        """The run can be continued from `step`."""
        log.info("checkpoint of step %d is complete", step)
        self._update(checkpoint=step)

    def warmup(self, step: int, values: dict[str, float]) -> None:
        """A step of the supervised warm-up. Its steps count for themselves."""
        self._metrics.record({k: v for k, v in values.items() if find(k).role in OWN_ROLES})
        self._update(state="warmup", step=step, num_steps=self._num_warmup_steps)

    def evaluation(self, step: int, answers: Sequence[GroupSummary]) -> float:
        """Log one evaluation, of one answer a prompt; returns its mean reward."""
        mean = float(np.mean([answer.rewards[0] for answer in answers]))
        values = {
            "evaluation/reward_mean": mean,
            "evaluation/num_prompts": float(len(answers)),
            **part_means(answers, "evaluation/part"),
        }
        self._log.append(step, self._clock(), values)
        self._metrics.record(values)
        return mean

    def buffer(self, stats: BufferStats) -> None:
        self._buffer = stats
        self._update()

    def close(self) -> None:
        self._log.close()

    def _counters(self) -> dict[str, float]:
        sync = self._sync()
        values = {
            "run/disk_free_fraction": disk_free_fraction(self._rundir.path),
            "weights/version_published": float(sync.published),
            "weights/version_live": float(sync.live),
            "weights/snapshot_s": sync.snapshot_s,
            "weights/publish_s": sync.publish_s,
            "weights/pull_s": sync.pull_s,
            "weights/bytes": float(sync.num_bytes),
            "weights/stored_bytes": float(sync.stored_bytes),
            "weights/publishes_skipped_total": float(sync.skipped),
            "weights/refused_total": float(sync.refused),
            "buffer/recovered_total": float(self._num_recovered),
            "run/sinks_dropped_total": float(self._log.num_dropped_sinks),
        }
        for pool in self._pools:
            values[f"pool/size/{pool.kind}"] = float(len(pool.live))
            values[f"pool/wanted/{pool.kind}"] = float(pool.wanted)
            values[f"pool/restarts_total/{pool.kind}"] = float(pool.num_restarts)
            values[f"pool/quarantined_total/{pool.kind}"] = float(pool.num_quarantined)
        if self._buffer is not None:
            values |= buffer_metrics(self._buffer)
        return {**values, **self._further()}

    def _update(self, **changes: Any) -> None:
        now, sync = self._clock(), self._sync()
        pools = tuple(
            Pool(
                name=p.kind,
                alive=len(p.live),
                wanted=p.wanted,
                restarts=p.num_restarts,
                quarantined=p.num_quarantined,
            )
            for p in self._pools
        )
        if self._buffer is not None:
            changes |= {
                "buffer_in_flight": len(self._buffer.in_flight),
                "buffer_ready": self._buffer.ready,
                "buffer_discarded": self._buffer.num_discarded,
            }
        self.snapshot = replace(
            self.snapshot,
            time_s=now,
            elapsed_s=now - self._started_s,
            pools=pools,
            version_published=sync.published if sync.published >= 0 else None,
            version_live=sync.live if sync.live >= 0 else None,
            events=tuple(self._events),
            **changes,
        )
        self._rundir.write_status(self.snapshot)
        self._show(self.snapshot)


def group_metrics(taken: Sequence[Taken], times: StepTimes) -> dict[str, float]:
    """Rewards, lengths and times of one step, from the groups' summaries."""
    rewards = np.array([r for t in taken for r in t.summary.rewards], dtype=np.float64)
    tokens = np.array([t.summary.num_tokens for t in taken], dtype=np.float64)
    flat = [max(t.summary.rewards) == min(t.summary.rewards) for t in taken]
    steps = [r for t in taken for r in t.summary.step_rewards]
    of_steps = {}
    if steps:
        of_steps["reward/reasoning_step_mean"] = float(np.mean(steps))
        of_steps["reward/reasoning_steps_mean"] = len(steps) / len(rewards)
    return {
        **of_steps,
        **part_means([t.summary for t in taken], "reward/part"),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "reward/zero_std_groups_fraction": float(np.mean(flat)),
        "response/length_mean_tokens": float(tokens.sum() / len(rewards)),
        "response/length_max_tokens": float(max(t.summary.longest_tokens for t in taken)),
        "response/stopped_fraction": sum(t.summary.num_stopped for t in taken) / len(rewards),
        "step/groups": float(len(taken)),
        "step/rollouts": float(len(rewards)),
        "step/response_tokens": float(tokens.sum()),
        "step/tokens_per_s": float(tokens.sum() / times.step_s) if times.step_s > 0 else 0.0,
        "time/step_s": times.step_s,
        "time/learner_wait_s": times.learner_wait_s,
        "time/generation_wait_s": times.generation_wait_s,
        "time/train_s": times.train_s,
        "time/publish_wait_s": times.publish_wait_s,
        "time/generation_busy_s": times.generation_busy_s,
        "time/scoring_busy_s": times.scoring_busy_s,
    }


def disk_free_fraction(path: Path) -> float:
    """Of the file system that holds `path`; NaN where it does not say."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return math.nan
    return usage.free / usage.total
