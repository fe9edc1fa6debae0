"""THE table of metrics: every name that the project sends or writes, once.

Names are `area/quantity_unit`; counters end in `_total`. A name without a unit is a plain number,
a share between 0 and 1 (`_fraction`), or in the unit of the reward.
"""

from __future__ import annotations

from types import MappingProxyType

from rlhf_cluster.errors import MetricError
from rlhf_cluster.observe.metrics.dataset_metrics import GENERATE_ROWS
from rlhf_cluster.observe.metrics.learner_metrics import LEARNER_ROWS, REPLAY_ROWS
from rlhf_cluster.observe.metrics.metric import (
    Metric,
    Role,
    counter,
    gauge,
    times,
)
from rlhf_cluster.observe.metrics.offline_metrics import (
    DISTILLATION_ROWS,
    PREFERENCE_ROWS,
    PROCESS_ROWS,
    STAGE_ROWS,
)


def _rewards() -> tuple[Metric, ...]:
    role = Role.CONTROLLER
    return (
        gauge("reward/mean", "reward", role, "Mean reward of the step's rollouts"),
        gauge("reward/std", "reward", role, "Standard deviation of the step's rewards"),
        gauge("reward/min", "reward", role, "Smallest reward of the step"),
        gauge("reward/max", "reward", role, "Largest reward of the step"),
        gauge(
            "reward/part",
            "reward",
            role,
            "Mean of one part of the reward, or of what is watched beside it",
            "part",
        ),
        gauge(
            "reward/running_mean", "reward", Role.LEARNER, "By which a part is normalised", "part"
        ),
        gauge("reward/running_std", "reward", Role.LEARNER, "The same, the deviation", "part"),
        gauge("reward/reasoning_step_mean", "reward", role, "Mean reward of a reasoning step"),
        gauge("reward/reasoning_steps_mean", "1", role, "Mean number of reasoning steps scored"),
        gauge("reward/zero_std_groups_fraction", "1", role, "Groups whose rewards are all equal"),
        gauge("evaluation/reward_mean", "reward", role, "Mean reward of greedy held-out answers"),
        gauge("evaluation/part", "reward", role, "The same of one part, or watched score", "part"),
        gauge("evaluation/num_prompts", "1", role, "Held-out prompts that were answered"),
        gauge("evaluation/failed_prompts", "1", role, "Held-out prompts that nobody could answer"),
        gauge("response/length_mean_tokens", "tokens", role, "Mean length of the step's responses"),
        gauge("response/length_max_tokens", "tokens", role, "Longest response of the step"),
        gauge("response/stopped_fraction", "1", role, "Responses that the model ended itself"),
    )


def _steps() -> tuple[Metric, ...]:
    role = Role.CONTROLLER
    return (
        gauge(
            "step/number",
            "1",
            role,
            "Steps done, of learner.epochs * learner.minibatches optimizer steps each",
        ),
        gauge("step/groups", "1", role, "Groups that the step trained on"),
        gauge("step/rollouts", "1", role, "Rollouts that the step trained on"),
        gauge("step/response_tokens", "tokens", role, "Response tokens of the step"),
        gauge("step/tokens_per_s", "tokens/s", role, "Response tokens trained by wall time"),
        gauge("time/step_s", "s", role, "Wall time of the step, waiting included"),
        gauge("time/learner_wait_s", "s", role, "The learner waited for groups"),
        gauge("time/train_s", "s", role, "The learner trained"),
        gauge("time/publish_wait_s", "s", role, "The learner waited for the copy of its weights"),
        gauge(
            "time/generation_wait_s", "s", role, "No group under way: generation waited for a slot"
        ),
        gauge("time/generation_busy_s", "s", role, "Generation workers had a group, mean of them"),
        gauge("time/scoring_busy_s", "s", role, "Scoring workers had a group, mean of them"),
        gauge("time/pool_busy_s", "s", role, "The same of a pool of [scoring.pools]", "pool"),
        gauge(
            "advisor/gain",
            "1",
            role,
            "Speed with one worker more (a learner twice as fast) over now, as predicted",
            "station",
        ),
        gauge("staleness/pipeline_depth", "steps", role, "How far generation may run ahead"),
        gauge("staleness/bound", "steps", role, "Largest staleness that is trained"),
        counter(
            "staleness/rollouts_total",
            "1",
            role,
            "Rollouts trained, by the staleness of their group's oldest token",
            "staleness",
        ),
        gauge("run/disk_free_fraction", "1", role, "Free share of the disk of the run directory"),
        counter("run/sinks_dropped_total", "1", role, "Sinks of metrics that failed"),
        gauge("run/resident_bytes", "bytes", role, "Memory of the driver's process"),
    )


def _keeping() -> tuple[Metric, ...]:
    """Of the run as a whole: checkpoints, pools, restarts, the warm-up."""
    role = Role.CONTROLLER
    return (
        gauge("checkpoint/step", "1", role, "Step of the last complete checkpoint, -1 for none"),
        gauge("checkpoint/wait_s", "s", role, "The learner waited for the copy of a checkpoint"),
        gauge("checkpoint/write_s", "s", role, "Writing the last checkpoint, behind the steps"),
        gauge("checkpoint/bytes", "bytes", role, "Tensors of the last checkpoint"),
        counter("checkpoint/skipped_total", "1", role, "Left out: the one before was not written"),
        counter("checkpoint/failed_total", "1", role, "Checkpoints that could not be written"),
        gauge(
            "checkpoint/copied_step", "1", role, "Newest step at checkpoint.copy_to, -1 for none"
        ),
        counter(
            "checkpoint/copies_failed_total", "1", role, "Checkpoints that could not be copied"
        ),
        gauge("pool/size", "1", role, "Live workers of a pool", "pool"),
        gauge("pool/behind", "1", role, "Workers without the newest weights, and so work", "pool"),
        gauge("pool/wanted", "1", role, "Workers that a pool should have", "pool"),
        counter("pool/restarts_total", "1", role, "Workers that were replaced", "pool"),
        gauge(
            "pool/restarts_recent", "1", role, "Of them, within cluster.restart_window_s", "pool"
        ),
        gauge("pool/restarts_allowed", "1", role, "How many that window may hold", "pool"),
        counter("pool/quarantined_total", "1", role, "Restarts by a rule of quarantine", "pool"),
        counter("pool/autoscaled_total", "1", role, "Changes of size by [autoscale]", "pool"),
        counter(
            "learner/restarts_total", "1", role, "Learner and buffer started anew after a loss"
        ),
        gauge("learner/ranks", "1", role, "Ranks that train; fewer than asked after a shrink"),
        gauge("learner/spares_ready", "1", role, "Hot spares that wait to become ranks"),
        counter("control/restarts_total", "1", role, "Control channels opened anew after a loss"),
        gauge("sft/loss", "nats", role, "Mean loss of a target token in the warm-up"),
        gauge("sft/grad_norm", "1", role, "Gradient norm of a warm-up step, before clipping"),
        gauge("sft/grad_norm_part", "1", role, "The same of one group of parameters", "group"),
        gauge("sft/learning_rate", "1", role, "Learning rate of a warm-up step"),
        gauge("sft/entropy", "nats", role, "Mean entropy at a target token in the warm-up"),
        gauge("sft/skipped_steps", "1", role, "1 when the warm-up step was left out"),
        gauge("sft/tokens", "tokens", role, "Target tokens of a warm-up step"),
    )


def _generation() -> tuple[Metric, ...]:
    role, driver = Role.GENERATION, Role.CONTROLLER
    return (
        gauge("generation/requests_running", "1", role, "Requests in the engine's batch"),
        gauge("generation/requests_waiting", "1", role, "Requests that wait for the batch"),
        gauge("generation/kv_cache_use_fraction", "1", role, "Share of the KV cache in use"),
        gauge("generation/version_live", "1", role, "Weight version that samples"),
        counter("generation/tokens_total", "tokens", role, "Tokens sampled"),
        counter("generation/prompt_tokens_total", "tokens", role, "Prompt tokens, once a group"),
        counter("generation/groups_total", "1", role, "Groups sampled"),
        counter("generation/responses_total", "1", role, "Responses, by why they ended", "reason"),
        counter(
            "generation/prefix_tokens_total",
            "tokens",
            role,
            "Prompt tokens that the prefix cache was asked for, of one sample a request",
        ),
        counter("generation/prefix_hit_tokens_total", "tokens", role, "Of them, those it had"),
        counter("generation/draft_tokens_total", "tokens", role, "Tokens that the draft proposed"),
        counter("generation/draft_accepted_tokens_total", "tokens", role, "Of them, those taken"),
        gauge("generation/resident_bytes", "bytes", role, "Memory of the worker's own process"),
        counter("generation/retries_total", "1", driver, "Groups, or segments, tried again"),
        counter("generation/errors_total", "1", role, "Groups that failed", "reason"),
        counter("generation/segments_total", "1", driver, "Groups sampled, or segments of them"),
        counter(
            "generation/segments_queued_total",
            "1",
            driver,
            "Those at whose end requests waited for the batch",
        ),
        counter(
            "generation/tokens_kept_total", "tokens", driver, "Tokens before a segment tried again"
        ),
        counter(
            "generation/tokens_resampled_total", "tokens", driver, "Tokens sampled by tries again"
        ),
        counter("generation/pulls_total", "1", role, "Weight versions pulled"),
        times("generation/group_s", role, "Time of one group, queueing included"),
        times("generation/pull_s", role, "Time of one pull, reading included"),
        times("generation/pull_pause_s", role, "Sampling stood still for a pull"),
    )


def _scoring() -> tuple[Metric, ...]:
    role, driver = Role.SCORING, Role.CONTROLLER
    return (
        counter("scoring/groups_total", "1", role, "Groups scored"),
        counter("scoring/errors_total", "1", role, "Groups whose scoring failed", "reason"),
        counter("scoring/retries_total", "1", driver, "Groups whose scoring was tried again"),
        counter("scoring/cache_hits_total", "1", role, "Scores of rollouts that were kept"),
        counter("scoring/cache_misses_total", "1", role, "Scores that could be kept, and were not"),
        counter(
            "scoring/watched_errors_total",
            "1",
            role,
            "Groups without the score of a watched reward",
            "reward",
        ),
        gauge("scoring/groups_running", "1", role, "Groups being scored"),
        gauge("scoring/resident_bytes", "bytes", role, "Memory of the worker's own process"),
        gauge("scoring/reference_version", "1", role, "Policy version behind the reference"),
        times("scoring/latency_s", role, "Time of one group at a worker, all that it serves"),
    )


def _buffer() -> tuple[Metric, ...]:
    role, driver = Role.BUFFER, Role.CONTROLLER
    return (
        counter("buffer/admitted_total", "1", role, "Groups admitted"),
        counter("buffer/finished_total", "1", role, "Groups generated and scored"),
        counter("buffer/discarded_total", "1", role, "Groups given up", "reason"),
        counter(
            "buffer/taken_total", "1", role, "Groups handed to the learner, each once (fresh ones)"
        ),
        counter("buffer/recovered_total", "1", driver, "Groups found on disk, not generated again"),
        counter(
            "buffer/reweighted_total", "1", role, "Groups over max_staleness that were trained"
        ),
        gauge("buffer/in_flight", "1", role, "Groups being generated or scored"),
        gauge("buffer/resident_bytes", "bytes", role, "Memory of the buffer's process"),
        gauge("buffer/ready", "1", role, "Finished groups that wait for the learner"),
        gauge("buffer/oldest_age_s", "s", role, "Since the oldest group not taken was admitted"),
    )


def _weights() -> tuple[Metric, ...]:
    role = Role.WEIGHTS
    return (
        gauge("weights/version_published", "1", role, "Newest version in the store"),
        gauge("weights/version_live", "1", role, "Newest version live on every worker"),
        gauge("weights/snapshot_s", "s", role, "Copy of the weights out of the learner"),
        gauge("weights/publish_s", "s", role, "Write of the last version"),
        gauge("weights/pull_s", "s", role, "From written to live on every worker"),
        gauge("weights/bytes", "bytes", role, "Size of the last version"),
        gauge("weights/stored_bytes", "bytes", role, "Size of the files written for it"),
        counter("weights/publishes_skipped_total", "1", role, "Due versions never written"),
        counter("weights/refused_total", "1", role, "Versions that no worker could read whole"),
    )


def _index(rows: tuple[Metric, ...]) -> dict[str, Metric]:
    """Rows by name. Raises `MetricError` when two rows share a name."""
    by_name = {row.name: row for row in rows}
    if len(by_name) != len(rows):
        names = [row.name for row in rows]
        twice = sorted({n for n in names if names.count(n) > 1})
        raise MetricError(f"metrics with the same name: {', '.join(twice)}. Rename one of each")
    return by_name


METRICS = MappingProxyType(
    _index(
        (
            *_rewards(),
            *_steps(),
            *_keeping(),
            *_generation(),
            *_scoring(),
            *_buffer(),
            *REPLAY_ROWS,
            *LEARNER_ROWS,
            *_weights(),
            *STAGE_ROWS,
            *PREFERENCE_ROWS,
            *PROCESS_ROWS,
            *GENERATE_ROWS,
            *DISTILLATION_ROWS,
        )
    )
)
