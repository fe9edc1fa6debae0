"""For each alert: series that must make it fire, and series near to them that must not.

A series is its name without `ray_rlhf_`, with labels beside `run`, and its values a minute in
promtool's notation ("0+1x30" is 0, 1, ... 30). `at` is the minute that is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Series = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    fires: Series
    silent: Series
    at: int
    labels: Mapping[str, str] = field(default_factory=dict)  # of the alert, beside run and severity


def _group_times(slow: float) -> dict[str, str]:
    """Three workers with a group a minute, of which the third needs `slow` seconds."""
    return {
        f'generation_group_s_{kind}{{worker="generation-{n}"}}': f"0+{step}x60"
        for n, each in enumerate((2.0, 2.2, slow))
        for kind, step in (("sum", each), ("count", 1))
    }


CASES = {
    "LearnerStalled": Case(
        fires={"step_number": "0+1x5 5x40"}, silent={"step_number": "0+0.1x60"}, at=45
    ),
    "StalenessNearBound": Case(
        fires={
            'staleness_max{worker="learner-0"}': "3x30",
            "staleness_bound": "3x30",
            "staleness_pipeline_depth": "1x30",
        },
        silent={
            'staleness_max{worker="learner-0"}': "2x30",
            "staleness_bound": "2x30",
            "staleness_pipeline_depth": "2x30",
        },
        at=20,
    ),
    "VersionNotLive": Case(
        fires={"weights_version_published": "0+1x60", "weights_version_live": "0+1x10 10x60"},
        silent={"weights_version_published": "1+1x60", "weights_version_live": "0+1x60"},
        at=40,
    ),
    "WorkersMissing": Case(
        fires={
            'pool_size{pool="generation"}': "3x30",
            'pool_wanted{pool="generation"}': "4x30",
            'pool_size{pool="scoring"}': "2x30",
            'pool_wanted{pool="scoring"}': "2x30",
        },
        silent={
            'pool_size{pool="generation"}': "4x10 3x5 4x15",
            'pool_wanted{pool="generation"}': "4x30",
        },
        at=20,
        labels={"pool": "generation"},
    ),
    "SlowWorker": Case(
        fires=_group_times(9.0),
        silent=_group_times(4.0),
        at=40,
        labels={"worker": "generation-2"},
    ),
    "RewardErrors": Case(
        fires={'scoring_errors_total{worker="scoring-0",reason="ScoringError"}': "0+1x30"},
        silent={
            'scoring_errors_total{worker="scoring-0",reason="ScoringError"}': "0+1x30",
            'scoring_groups_total{worker="scoring-0"}': "0+99x30",
        },
        at=25,
    ),
    "GenerationErrors": Case(
        fires={
            'generation_errors_total{worker="generation-0",reason="WorkerError"}': "0+1x30",
            'generation_groups_total{worker="generation-0"}': "0+9x30",
        },
        silent={
            'generation_errors_total{worker="generation-0",reason="WorkerError"}': "0+1x30",
            'generation_groups_total{worker="generation-0"}': "0+99x30",
        },
        at=25,
    ),
    "WorkerCrashLoop": Case(
        fires={'pool_restarts_total{pool="generation"}': "_x20 1+1x2 3x40"},
        silent={'pool_restarts_total{pool="generation"}': "1x20 2+1x1 3x40"},
        at=45,
        labels={"pool": "generation"},
    ),
    "LearnerCrashLoop": Case(
        fires={"learner_restarts_total": "_x5 1+1x1 2x70"},
        silent={"learner_restarts_total": "_x5 1x80"},
        at=30,
    ),
    "CheckpointsFail": Case(
        fires={"checkpoint_failed_total": "_x140 1x60"},
        silent={"checkpoint_failed_total": "1x200"},
        at=150,
    ),
    "DiskFillsUp": Case(
        fires={"run_disk_free_fraction": "0.6-0.005x90"},
        silent={"run_disk_free_fraction": "0.6-0.0005x90"},
        at=80,
    ),
    "KlExplosion": Case(
        fires={'learner_kl_ref_response{worker="learner-0"}': "3x20 11x30"},
        silent={'learner_kl_ref_response{worker="learner-0"}': "3+0.1x60"},
        at=27,
    ),
    "EntropyCollapse": Case(
        fires={'learner_entropy{worker="learner-0"}': "2x60 0.1x60"},
        silent={'learner_entropy{worker="learner-0"}': "2x60 0.5x60"},
        at=100,
    ),
    "RewardHackingSigns": Case(
        fires={
            "reward_mean": "0.3+0.001x150",
            "response_length_mean_tokens": "100+2x150",
            'learner_kl_ref_response{worker="learner-0"}': "1+0.05x150",
        },
        silent={
            "reward_mean": "0.3+0.001x150",
            "response_length_mean_tokens": "100+0.2x150",
            'learner_kl_ref_response{worker="learner-0"}': "1+0.05x150",
        },
        at=80,
    ),
    "NoLearningSignal": Case(
        fires={"reward_zero_std_groups_fraction": "0.95x60"},
        silent={"reward_zero_std_groups_fraction": "0.85x60"},
        at=40,
    ),
    "StepsSkipped": Case(
        fires={'learner_skipped_steps{worker="learner-0"}': "0x10 0+1x5 5x40"},
        silent={'learner_skipped_steps{worker="learner-0"}': "5x60"},
        at=20,
    ),
    "TrainInferenceMismatch": Case(
        fires={
            'importance_logprob_diff_mean_by_staleness{worker="learner-0",staleness="0"}': "0.2x30"
        },
        silent={
            'importance_logprob_diff_mean_by_staleness{worker="learner-0",staleness="2"}': "0.2x30",
            'importance_engine_mismatch_mean{worker="learner-0"}': "0.01x30",
        },
        at=20,
    ),
    "OffPolicy": Case(
        fires={'importance_effective_sample_size{worker="learner-0"}': "0.1x30"},
        silent={'importance_effective_sample_size{worker="learner-0"}': "0.7x30"},
        at=25,
    ),
}

HEALTHY: Series = {
    "step_number": "0+1x120",
    'staleness_max{worker="learner-0"}': "1x120",
    "staleness_bound": "2x120",
    "staleness_pipeline_depth": "1x120",
    "weights_version_published": "0+1x120",
    "weights_version_live": "0+1x120",
    'pool_size{pool="generation"}': "2x120",
    'pool_wanted{pool="generation"}': "2x120",
    'scoring_groups_total{worker="scoring-0"}': "0+60x120",
    'generation_groups_total{worker="generation-0"}': "0+60x120",
    **_group_times(2.5),
    "run_disk_free_fraction": "0.5x120",
    'learner_kl_ref_response{worker="learner-0"}': "0+0.02x120",
    'learner_entropy{worker="learner-0"}': "2-0.01x120",
    "reward_mean": "0.3+0.001x120",
    "response_length_mean_tokens": "100x120",
    "reward_zero_std_groups_fraction": "0.2x120",
    'learner_skipped_steps{worker="learner-0"}': "0x120",
    'importance_engine_mismatch_mean{worker="learner-0"}': "0.002x120",
    'importance_effective_sample_size{worker="learner-0"}': "0.95x120",
}
"""An undisturbed run of two hours."""
