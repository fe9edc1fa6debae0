"""Records of a run by its driver: step reports and counters to metrics.jsonl, status.json, screen.

Everything is written when it happens; nothing here waits for anything. The learner writes the samples
of rollouts, so that no rollout passes through the driver.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from actors.drivers.run_observer import Observer
from rlhf_cluster.buffer.buffer import BufferStats, buffer_metrics
from rlhf_cluster.buffer.replay_pool import replay_metrics
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.evaluation.evaluate import Evaluation, point_metrics
from rlhf_cluster.observe.metric_table import Role, find
from rlhf_cluster.observe.metrics import part_means
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.pipeline import StepTimes
from rlhf_cluster.records import StepReport, Ticket, TrainingGroup
from rlhf_cluster.run import bottleneck_advisor
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Pool, Record, Snapshot, State, read_metrics
from rlhf_cluster.run.worker_pool import WorkerPool
from rlhf_cluster.util.slow_disk import LatestValue
from rlhf_cluster.weights.sync import SyncStats

log = logging.getLogger(__name__)

_TRAINED = "staleness/rollouts_total/"  # followed by the staleness
_SKIPPED = "evaluation/set_skipped_total/"  # followed by the name of the set
OWN_ROLES = (Role.CONTROLLER, Role.WEIGHTS)  # processes of other roles export their own metrics


class RunObserver(Observer[RunConfig]):
    """Observer of the pipeline. `further` returns metrics of services that the driver has."""

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
        self._pools, self._sync, self._further = pools, sync, further
        self._num_warmup_steps = config.sft.steps
        self._rewards: deque[float] = deque(maxlen=10)
        self._recent: deque[dict[str, float]] = deque(maxlen=bottleneck_advisor.WINDOW)
        self._buffer: BufferStats | None = None
        self._num_recovered = 0
        self._staleness: Counter[int] = Counter()  # number of trained rollouts by staleness
        self._points: dict[tuple[str, int], float | None] = {}  # reward by set and version
        self._skips: Counter[str] = Counter()  # number of due evaluations without a point, by set
        self._covered: dict[str, int] = {}
        self.advice: bottleneck_advisor.Advice | None = None  # about the last steps
        self._disk_free = LatestValue(lambda: disk_free_fraction(rundir.path), math.nan)
        super().__init__(config, rundir, show, started_s, clock, config.run.steps)

    def step(self, report: StepReport, taken: Sequence[TrainingGroup], times: StepTimes) -> None:
        now = self._clock()
        self._note_first_step(now)
        values = {
            "staleness/pipeline_depth": float(self._config.staleness.pipeline_depth),
            **report.metrics,
            **group_metrics(taken, times),
            **replay_metrics(taken, self._config.buffer.replay, self._config.run.groups_per_step),
            **self._trained_by_staleness(report.step, taken),
            **self._counters(),
            "step/number": float(report.step),
            "staleness/bound": float(self._config.staleness.bound),
        }
        self._recent.append(values)
        advice = self.advice = bottleneck_advisor.advise(self._recent)
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
            left_s=self._time_left(report.step, now, times.step_s),
            staleness_mean=values.get("staleness/mean"),
            staleness_max=values.get("staleness/max"),
            response_length_tokens=values["response/length_mean_tokens"],
            tokens_per_s=values["step/tokens_per_s"],
            step_s=times.step_s,
            learner_wait_s=times.learner_wait_s,
            generation_wait_s=times.generation_wait_s,
            advice=None if advice is None else advice.text,
        )

    def _trained_by_staleness(self, step: int, taken: Sequence[TrainingGroup]) -> dict[str, float]:
        for group in taken:
            staleness = step - 1 - group.summary.oldest_version
            self._staleness[staleness] += group.summary.num_rollouts
        return {f"{_TRAINED}{s}": float(n) for s, n in self._staleness.items()}

    def num_workers(self, kind: str) -> int:
        """Return the number of live workers of a pool."""
        return sum(pool.num_live for pool in self._pools if pool.kind == kind)

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None:
        self.event(f"group {ticket.group_id} discarded: {error}")

    def group_recovered(self, ticket: Ticket) -> None:
        self._num_recovered += 1
        log.info("group %s was on disk", ticket.group_id)

    def state(self, state: State, error: str | None = None, **changes: Any) -> None:
        if self.snapshot.state == "warmup":
            changes |= {"step": 0, "num_steps": self._num_steps}
        super().state(state, error, **changes)

    def _services(self) -> Mapping[str, Any]:
        return {
            **{pool.kind: {"last_errors": pool.last_errors} for pool in self._pools},
            "buffer": None if self._buffer is None else asdict(self._buffer),
        }

    async def cut_back(self, checkpoint: Checkpoint | None) -> None:
        await super().cut_back(checkpoint)
        self._update(num_steps=self._num_steps)

    def _read_log(self) -> None:
        self._rewards.clear()
        self._recent.clear()
        self.advice = None
        self._staleness.clear()
        self._points.clear()
        self._skips.clear()
        self._covered.clear()
        for record in read_metrics(self._rundir.metrics):
            if record.get("reward/mean") is not None:
                self._rewards.append(record["reward/mean"])
            trained = {k: v for k, v in record.items() if k.startswith(_TRAINED)}
            self._staleness |= {int(k.removeprefix(_TRAINED)): int(v) for k, v in trained.items()}
            self._read_points(record)

    def _read_points(self, record: Record) -> None:
        for name in (each.name for each in self._config.evaluation.all_sets):
            step = int(record["step"])
            if record.get(f"evaluation/set_version/{name}") is not None:
                self._points[name, step] = record.get(f"evaluation/set_reward_mean/{name}")
                self._covered[name] = step
            if (skips := record.get(f"{_SKIPPED}{name}")) is not None:
                self._skips[name] = int(skips)
                self._covered[name] = step

    def warmup(self, step: int, values: dict[str, float]) -> None:
        """Record a step of the supervised warm-up, whose steps are counted separately."""
        self._metrics.record({k: v for k, v in values.items() if find(k).role in OWN_ROLES})
        self._update(state="warmup", step=step, num_steps=self._num_warmup_steps)

    @property
    def covered(self) -> Mapping[str, int]:
        """Newest version by evaluation set that has a point or a skip."""
        return self._covered

    def has_point(self, name: str, version: int) -> bool:
        """Whether the record has the point of this evaluation set at `version`."""
        return (name, version) in self._points

    def point(self, name: str, version: int) -> float | None:
        """Return the reward of a point; None if no prompt could be answered."""
        return self._points[name, version]

    def record_point(self, name: str, version: int, found: Evaluation) -> float | None:
        """Record the point of the set `name` at the step of `version`, however late it comes.

        Returns the mean reward of the answered prompts, None without any. The first set is also the one
        of the learning curve.
        """
        answers, failures, sets = found.answers, found.failures, self._config.evaluation.all_sets
        if failures:
            total = len(answers) + len(failures)
            self.event(
                f"evaluation of {name} after step {version}: {len(failures)} of {total} prompts "
                f"failed, and do not count. The first: {failures[0]}"
            )
        [of] = [each for each in sets if each.name == name]
        rewards = self._config.scoring.rewards
        weights = {r.name or r.type: r.weight for r in rewards if (r.name or r.type) in of.rewards}
        lag_steps = max(0, self._log.last_step - version)
        values = point_metrics(name, found, weights, version, lag_steps)
        mean = values.get(f"evaluation/set_reward_mean/{name}")
        if name == sets[0].name:
            values |= {
                "evaluation/num_prompts": float(len(answers)),
                "evaluation/failed_prompts": float(len(failures)),
                **part_means(answers, "evaluation/part"),
                **({} if mean is None else {"evaluation/reward_mean": mean}),
            }
        self._note_evaluation(name, version, values)
        self._points[name, version] = mean
        if name == sets[0].name and mean is not None:
            self._update(reward_held_out=mean)
        return mean

    def record_skip(self, name: str, version: int, reason: str) -> None:
        """Record that the set `name` has no point at `version`, although one was due, and why."""
        self.event(f"evaluation of {name} at version {version} is skipped: {reason}")
        self._skips[name] += 1
        self._note_evaluation(name, version, {f"{_SKIPPED}{name}": float(self._skips[name])})

    def _note_evaluation(self, name: str, version: int, values: Mapping[str, float]) -> None:
        self._log.append(version, self._clock(), values, late=True)
        self._metrics.record(values)
        self._covered[name] = version

    def buffer(self, stats: BufferStats) -> None:
        self._buffer = stats
        self._update()

    def _counters(self) -> dict[str, float]:
        sync = self._sync()
        values = {
            "run/disk_free_fraction": self._disk_free.value(),
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
            "run/resident_bytes": resident_bytes(),
        }
        for pool in self._pools:
            values[f"pool/size/{pool.kind}"] = float(len(pool.live))
            values[f"pool/behind/{pool.kind}"] = float(pool.num_behind)
            values[f"pool/wanted/{pool.kind}"] = float(pool.wanted)
            values[f"pool/restarts_total/{pool.kind}"] = float(pool.restarts.total)
            values[f"pool/restarts_recent/{pool.kind}"] = float(pool.restarts.recent)
            values[f"pool/restarts_allowed/{pool.kind}"] = float(pool.max_restarts)
            values[f"pool/quarantined_total/{pool.kind}"] = float(pool.num_quarantined)
            values[f"pool/autoscaled_total/{pool.kind}"] = float(pool.num_autoscaled)
        if self._buffer is not None:
            values |= buffer_metrics(self._buffer)
        return {**values, **self._further()}

    def _update(self, **changes: Any) -> None:
        sync = self._sync()
        pools = tuple(
            Pool(
                name=p.kind,
                alive=len(p.live),
                wanted=p.wanted,
                restarts=p.restarts.total,
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
        super()._update(
            pools=pools,
            version_published=sync.published if sync.published >= 0 else None,
            version_live=sync.live if sync.live >= 0 else None,
            **changes,
        )


def group_metrics(taken: Sequence[TrainingGroup], times: StepTimes) -> dict[str, float]:
    """Compute rewards, lengths and times of one step from the summaries of its groups.

    Rewards and lengths are those of fresh groups, so that each group is counted once in a run.
    """
    fresh = [t for t in taken if not t.uses]
    rewards = np.array([r for t in fresh for r in t.summary.rewards], dtype=np.float64)
    fresh_tokens = sum(t.summary.num_tokens for t in fresh)
    tokens = sum(t.summary.num_tokens for t in taken)
    flat = [max(t.summary.rewards) == min(t.summary.rewards) for t in fresh]
    steps = [r for t in fresh for r in t.summary.step_rewards]
    of_steps = {}
    if steps:
        of_steps["reward/reasoning_step_mean"] = float(np.mean(steps))
        of_steps["reward/reasoning_steps_mean"] = len(steps) / len(rewards)
    return {
        **of_steps,
        **part_means([t.summary for t in fresh], "reward/part"),
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std()),
        "reward/min": float(rewards.min()),
        "reward/max": float(rewards.max()),
        "reward/zero_std_groups_fraction": float(np.mean(flat)),
        "response/length_mean_tokens": fresh_tokens / len(rewards),
        "response/length_max_tokens": float(max(t.summary.longest_tokens for t in fresh)),
        "response/stopped_fraction": sum(t.summary.num_stopped for t in fresh) / len(rewards),
        "step/groups": float(len(taken)),
        "step/rollouts": float(sum(t.summary.num_rollouts for t in taken)),
        "step/response_tokens": float(tokens),
        "step/tokens_per_s": tokens / times.step_s if times.step_s > 0 else 0.0,
        "time/step_s": times.step_s,
        "time/learner_wait_s": times.learner_wait_s,
        "time/generation_wait_s": times.generation_wait_s,
        "time/train_s": times.train_s,
        "time/publish_wait_s": times.publish_wait_s,
        "time/generation_busy_s": times.generation_busy_s,
        "time/scoring_busy_s": times.scoring_busy_s,
        **{f"time/pool_busy_s/{pool}": busy for pool, busy in times.pool_busy_s.items()},
    }


def disk_free_fraction(path: Path) -> float:
    """Return the free share of the file system that holds `path`; NaN if it is not known."""
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return math.nan
    return usage.free / usage.total
