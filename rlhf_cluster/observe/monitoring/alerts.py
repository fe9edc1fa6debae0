"""THE table of alerts and recording rules, and the Prometheus files that are made from it.

Promises: every expression uses metrics of `rlhf_cluster.observe.metrics.metric_table` only, each as its
kind asks (`tests/unit/observe/test_monitoring.py`); every alert has a section of its name in
docs/runbook.md; each one fires when it should and not otherwise (`tests/system/test_alerts.py`, by
promtool).

Ray puts `ray_` before each name and labels of worker, node and session beside ours. `run` is on every
metric, so that all expressions aggregate by it. A counter's series begins with its first increase,
which `increase()` does not see: rare counters are compared with their value of some time ago, or 0.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RUNBOOK = "docs/runbook.md"
Severity = Literal["critical", "warning"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """`for_`: how long `expr` must hold. `summary` may use Prometheus' templates."""

    name: str
    expr: str
    for_: str
    severity: Severity
    summary: str

    @property
    def runbook(self) -> str:
        """The section of the alert, as GitHub's anchor."""
        return f"{RUNBOOK}#{self.name.lower()}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """An expression that is evaluated once and used under a name."""

    name: str
    expr: str


def _grown(name: str, by: str, window: str) -> str:
    """How much a rare counter grew, its first increase included."""
    return f"sum by ({by}) ({name} - ({name} offset {window} or 0 * {name}))"


def _failing(service: str) -> str:
    """Share of a service's groups that failed; 1 where none succeeded."""
    bad = f"sum by (run) (rate(ray_rlhf_{service}_errors_total[10m]))"
    good = f"sum by (run) (rate(ray_rlhf_{service}_groups_total[10m]))"
    return f"{bad} / ({bad} + ({good} or 0 * {bad}))"


RECORDED = (
    Recorded(
        name="rlhf:generation_group_s:mean10m",
        expr="sum by (run, worker) (rate(ray_rlhf_generation_group_s_sum[10m])) / "
        "sum by (run, worker) (rate(ray_rlhf_generation_group_s_count[10m]))",
    ),
    Recorded(name="rlhf:generation_failing:fraction10m", expr=_failing("generation")),
    Recorded(name="rlhf:scoring_failing:fraction10m", expr=_failing("scoring")),
    Recorded(
        name="rlhf:learner_wait:fraction",
        expr="max by (run) (ray_rlhf_time_learner_wait_s) / max by (run) (ray_rlhf_time_step_s)",
    ),
    Recorded(
        name="rlhf:generation_wait:fraction",
        expr="max by (run) (ray_rlhf_time_generation_wait_s) / max by (run) (ray_rlhf_time_step_s)",
    ),
    Recorded(
        name="rlhf:generation_tokens:rate5m",
        expr="sum by (run) (rate(ray_rlhf_generation_tokens_total[5m]))",
    ),
)

_PROGRESS = (
    Alert(
        name="LearnerStalled",
        expr="max by (run) (changes(ray_rlhf_step_number[20m])) == 0",
        for_="10m",
        severity="critical",
        summary="{{ $labels.run }}: no optimizer step in half an hour",
    ),
    Alert(
        name="StalenessNearBound",
        expr="(max by (run) (ray_rlhf_staleness_max) >= max by (run) (ray_rlhf_staleness_bound)) "
        "> max by (run) (ray_rlhf_staleness_pipeline_depth)",
        for_="10m",
        severity="warning",
        summary="{{ $labels.run }}: staleness {{ $value }} is at the bound and over what the "
        "pipeline depth asks for",
    ),
    Alert(
        name="VersionNotLive",
        expr="max by (run) (ray_rlhf_weights_version_published - ray_rlhf_weights_version_live) > 0 "
        "and max by (run) (changes(ray_rlhf_weights_version_live[15m])) == 0",
        for_="5m",
        severity="critical",
        summary="{{ $labels.run }}: published weights have not got live for a quarter of an hour",
    ),
    Alert(
        name="WorkersMissing",
        expr="max by (run, pool) (ray_rlhf_pool_size) < max by (run, pool) (ray_rlhf_pool_wanted)",
        for_="10m",
        severity="warning",
        summary="{{ $labels.run }}: {{ $value }} {{ $labels.pool }} workers, fewer than wanted",
    ),
    Alert(
        name="SlowWorker",
        expr="rlhf:generation_group_s:mean10m > on (run) group_left () "
        "2 * quantile by (run) (0.5, rlhf:generation_group_s:mean10m)",
        for_="15m",
        severity="warning",
        summary="{{ $labels.run }}: {{ $labels.worker }} needs {{ $value }} s a group, over twice "
        "its pool's median",
    ),
)

_FAILURES = (
    Alert(
        name="RewardErrors",
        expr="rlhf:scoring_failing:fraction10m > 0.05",
        for_="5m",
        severity="critical",
        summary="{{ $labels.run }}: scoring of {{ $value | humanizePercentage }} of the groups fails",
    ),
    Alert(
        name="GenerationErrors",
        expr="rlhf:generation_failing:fraction10m > 0.05",
        for_="5m",
        severity="warning",
        summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of the groups fail at a "
        "generation worker",
    ),
    Alert(
        name="WorkerCrashLoop",
        expr=f"{_grown('ray_rlhf_pool_restarts_total', 'run, pool', '30m')} >= 3",
        for_="0m",
        severity="critical",
        summary="{{ $labels.run }}: {{ $value }} {{ $labels.pool }} workers replaced in 30 minutes",
    ),
    Alert(
        name="LearnerCrashLoop",
        expr=f"{_grown('ray_rlhf_learner_restarts_total', 'run', '1h')} >= 2",
        for_="0m",
        severity="critical",
        summary="{{ $labels.run }}: the learner was lost {{ $value }} times in an hour",
    ),
    Alert(
        name="CheckpointsFail",
        expr=f"{_grown('ray_rlhf_checkpoint_failed_total', 'run', '2h')} > 0",
        for_="0m",
        severity="critical",
        summary="{{ $labels.run }}: {{ $value }} checkpoints could not be written in 2 hours",
    ),
    Alert(
        name="DiskFillsUp",
        expr="min by (run) (ray_rlhf_run_disk_free_fraction) < 0.05 or "
        "min by (run) (predict_linear(ray_rlhf_run_disk_free_fraction[1h], 4 * 3600)) < 0",
        for_="10m",
        severity="critical",
        summary="{{ $labels.run }}: the disk of the run directory is full, or will be in 4 hours",
    ),
)

_LEARNING = (
    Alert(
        name="KlExplosion",
        expr="max by (run) (ray_rlhf_learner_kl_ref_response) > 15 or "
        "max by (run) (delta(ray_rlhf_learner_kl_ref_response[10m])) > 5",
        for_="5m",
        severity="critical",
        summary="{{ $labels.run }}: KL to the reference jumped or is far out ({{ $value }} nats)",
    ),
    Alert(
        name="EntropyCollapse",
        expr="max by (run) (avg_over_time(ray_rlhf_learner_entropy[10m])) < "
        "0.1 * max by (run) (max_over_time(ray_rlhf_learner_entropy[6h]))",
        for_="10m",
        severity="warning",
        summary="{{ $labels.run }}: entropy {{ $value }} nats, under a tenth of what it was",
    ),
    Alert(
        name="RewardHackingSigns",
        expr="max by (run) (delta(ray_rlhf_reward_mean[1h])) > 0 "
        "and (abs(max by (run) (delta(ray_rlhf_response_length_mean_tokens[1h]))) > "
        "0.5 * max by (run) (ray_rlhf_response_length_mean_tokens offset 1h)) "
        "and (max by (run) (ray_rlhf_learner_kl_ref_response) > "
        "1.5 * max by (run) (ray_rlhf_learner_kl_ref_response offset 1h))",
        for_="15m",
        severity="warning",
        summary="{{ $labels.run }}: reward rises while length changes by half and KL grows",
    ),
    Alert(
        name="NoLearningSignal",
        expr="max by (run) (avg_over_time(ray_rlhf_reward_zero_std_groups_fraction[15m])) > 0.9",
        for_="15m",
        severity="warning",
        summary="{{ $labels.run }}: {{ $value | humanizePercentage }} of the groups have equal "
        "rewards",
    ),
    Alert(
        name="StepsSkipped",
        expr="max by (run) (delta(ray_rlhf_learner_skipped_steps[30m])) >= 3",
        for_="0m",
        severity="critical",
        summary="{{ $labels.run }}: {{ $value }} steps left out, their gradients were not finite",
    ),
    Alert(
        name="TrainInferenceMismatch",
        expr="max by (run) (ray_rlhf_importance_engine_mismatch_mean) > 0.05 or "
        'max by (run) (ray_rlhf_importance_logprob_diff_mean_by_staleness{staleness="0"}) > 0.05',
        for_="10m",
        severity="critical",
        summary="{{ $labels.run }}: engine and learner differ by {{ $value }} nats a token on the "
        "same weights",
    ),
    Alert(
        name="OffPolicy",
        expr="min by (run) (avg_over_time(ray_rlhf_importance_effective_sample_size[10m])) < 0.3",
        for_="10m",
        severity="warning",
        summary="{{ $labels.run }}: effective sample size {{ $value }}: most tokens count for little",
    ),
)

ALERTS: tuple[Alert, ...] = (*_PROGRESS, *_FAILURES, *_LEARNING)

_HEAD = (
    "# Made by `python deploy/generate.py` from rlhf_cluster/observe/monitoring/alerts.py: "
    "change it there.\n"
)

_GLOBAL = """\
global:
  scrape_interval: 15s
  evaluation_interval: 15s

rule_files:
  - recording.rules.yml
  - alerts.rules.yml

scrape_configs:
"""

_CLUSTER = """\
  # Ray writes this file on the head node and keeps it up to date: nodes that join are found, nodes
  # that leave are dropped. Run Prometheus where it sees the file (ray start --temp-dir, /tmp/ray).
  - job_name: ray
    file_sd_configs:
      - files:
          - /tmp/ray/prom_metrics_service_discovery.json
        refresh_interval: 10s
"""

_BOX = """\
  # One box, no service discovery: ray start --head --metrics-export-port=8080
  - job_name: ray
    static_configs:
      - targets:
          - localhost:8080
"""


def prometheus_files() -> dict[str, str]:
    """The files of deploy/prometheus, content by name."""
    contents = {
        "prometheus.yml": _GLOBAL + _CLUSTER,
        "prometheus-box.yml": _GLOBAL + _BOX,
        "recording.rules.yml": _recording_rules(RECORDED),
        "alerts.rules.yml": _alert_rules(ALERTS),
    }
    return {name: _HEAD + content for name, content in contents.items()}


def _recording_rules(recorded: Sequence[Recorded]) -> str:
    lines = ["groups:", "  - name: rlhf", "    rules:"]
    for rule in recorded:
        lines += [f"      - record: {rule.name}", f"        expr: {_quoted(rule.expr)}"]
    return "\n".join(lines) + "\n"


def _alert_rules(alerts: Sequence[Alert]) -> str:
    lines = ["groups:", "  - name: rlhf-alerts", "    rules:"]
    for alert in alerts:
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {_quoted(alert.expr)}",
            f"        for: {alert.for_}",
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {_quoted(alert.summary)}",
            f"          runbook: {alert.runbook}",
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A double-quoted scalar: every JSON string is one."""
    return json.dumps(text)
