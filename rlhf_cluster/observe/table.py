"""THE table of metrics: every name that the project sends or writes, once.

Names are `area/quantity_unit`; counters end in `_total`. A name without a unit is a plain number,
a share between 0 and 1 (`_fraction`), or in the unit of the reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from rlhf_cluster.errors import MetricError
from rlhf_cluster.observe.preference_rows import PREFERENCE_ROWS
from rlhf_cluster.observe.stage_rows import STAGE_ROWS

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Kind(StrEnum):
    GAUGE = "gauge"  # a current value
    COUNTER = "counter"  # a sum that only grows; name ends in _total
    HISTOGRAM = "histogram"  # a distribution of single values


class Role(StrEnum):
    """The service that a metric comes from."""

    CONTROLLER = "controller"
    GENERATION = "generation"
    SCORING = "scoring"
    BUFFER = "buffer"
    LEARNER = "learner"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One row of the table. `unit` is "1" for a number without one; `label` splits the metric."""

    name: str
    kind: Kind
    unit: str
    help: str
    role: Role
    label: str | None = None
    buckets: tuple[float, ...] = ()

    @property
    def prometheus_name(self) -> str:
        return "rlhf_" + self.name.replace("/", "_")


def _gauge(name: str, unit: str, role: Role, help: str, label: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, unit=unit, help=help, role=role, label=label)


def _counter(name: str, unit: str, role: Role, help: str, label: str | None = None) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, unit=unit, help=help, role=role, label=label)


def _times(name: str, role: Role, help: str) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, unit="s", help=help, role=role, buckets=SECONDS)


def _controller() -> tuple[Metric, ...]:
    role = Role.CONTROLLER
    return (
        _gauge("reward/mean", "reward", role, "Mean reward of the step's rollouts"),
        _gauge("reward/std", "reward", role, "Standard deviation of the step's rewards"),
        _gauge("reward/min", "reward", role, "Smallest reward of the step"),
        _gauge("reward/max", "reward", role, "Largest reward of the step"),
        _gauge("reward/part", "reward", role, "Mean of one part of the reward", "part"),
        _gauge("reward/reasoning_step_mean", "reward", role, "Mean reward of a reasoning step"),
        _gauge("reward/reasoning_steps_mean", "1", role, "Mean number of reasoning steps scored"),
        _gauge("reward/zero_std_groups_fraction", "1", role, "Groups whose rewards are all equal"),
        _gauge("evaluation/reward_mean", "reward", role, "Mean reward of greedy held-out answers"),
        _gauge("evaluation/num_prompts", "1", role, "Held-out prompts that were answered"),
        _gauge(
            "response/length_mean_tokens", "tokens", role, "Mean length of the step's responses"
        ),
        _gauge("response/length_max_tokens", "tokens", role, "Longest response of the step"),
        _gauge("response/stopped_fraction", "1", role, "Responses that the model ended itself"),
        _gauge("step/number", "1", role, "Optimizer steps done"),
        _gauge("step/groups", "1", role, "Groups that the step trained on"),
        _gauge("step/rollouts", "1", role, "Rollouts that the step trained on"),
        _gauge("step/response_tokens", "tokens", role, "Response tokens of the step"),
        _gauge("step/tokens_per_s", "tokens/s", role, "Response tokens trained by wall time"),
        _gauge("time/step_s", "s", role, "Wall time of the step, waiting included"),
        _gauge("time/learner_wait_s", "s", role, "The learner waited for groups"),
        _gauge("time/train_s", "s", role, "The learner trained"),
        _gauge("time/publish_wait_s", "s", role, "The learner waited for the copy of its weights"),
        _gauge(
            "time/generation_wait_s", "s", role, "No group under way: generation waited for a slot"
        ),
        _gauge("time/generation_busy_s", "s", role, "Generation workers had a group, mean of them"),
        _gauge("time/scoring_busy_s", "s", role, "Scoring workers had a group, mean of them"),
        _gauge(
            "advisor/gain",
            "1",
            role,
            "Speed with one worker more (a learner twice as fast) over now, as predicted",
            "station",
        ),
        _gauge("staleness/pipeline_depth", "steps", role, "How far generation may run ahead"),
        _gauge("staleness/bound", "steps", role, "Largest staleness that is trained"),
        _gauge("run/disk_free_fraction", "1", role, "Free share of the disk of the run directory"),
    )


def _keeping() -> tuple[Metric, ...]:
    """Of the run as a whole: checkpoints, pools, restarts, the warm-up."""
    role = Role.CONTROLLER
    return (
        _gauge("checkpoint/step", "1", role, "Step of the last complete checkpoint, -1 for none"),
        _gauge("checkpoint/wait_s", "s", role, "The learner waited for the copy of a checkpoint"),
        _gauge("checkpoint/write_s", "s", role, "Writing the last checkpoint, behind the steps"),
        _gauge("checkpoint/bytes", "bytes", role, "Tensors of the last checkpoint"),
        _counter("checkpoint/skipped_total", "1", role, "Left out: the one before was not written"),
        _counter("checkpoint/failed_total", "1", role, "Checkpoints that could not be written"),
        _gauge(
            "checkpoint/copied_step", "1", role, "Newest step at checkpoint.copy_to, -1 for none"
        ),
        _counter(
            "checkpoint/copies_failed_total", "1", role, "Checkpoints that could not be copied"
        ),
        _gauge("pool/size", "1", role, "Live workers of a pool", "pool"),
        _gauge("pool/wanted", "1", role, "Workers that a pool should have", "pool"),
        _counter("pool/restarts_total", "1", role, "Workers that were replaced", "pool"),
        _counter("pool/quarantined_total", "1", role, "Of them, by a rule of quarantine", "pool"),
        _counter(
            "learner/restarts_total", "1", role, "Learner and buffer started anew after a loss"
        ),
        _gauge("learner/ranks", "1", role, "Ranks that train; fewer than asked after a shrink"),
        _counter("control/restarts_total", "1", role, "Control channels opened anew after a loss"),
        _gauge("sft/loss", "nats", role, "Mean loss of a target token in the warm-up"),
        _gauge("sft/grad_norm", "1", role, "Gradient norm of a warm-up step, before clipping"),
        _gauge("sft/grad_norm_part", "1", role, "The same of one group of parameters", "group"),
        _gauge("sft/learning_rate", "1", role, "Learning rate of a warm-up step"),
        _gauge("sft/entropy", "nats", role, "Mean entropy at a target token in the warm-up"),
        _gauge("sft/skipped_steps", "1", role, "1 when the warm-up step was left out"),
        _gauge("sft/tokens", "tokens", role, "Target tokens of a warm-up step"),
    )


def _generation() -> tuple[Metric, ...]:
    role, driver = Role.GENERATION, Role.CONTROLLER
    return (
        _gauge("generation/tokens_per_s", "tokens/s", role, "Tokens sampled by wall time"),
        _gauge("generation/requests_running", "1", role, "Requests in the engine's batch"),
        _gauge("generation/requests_waiting", "1", role, "Requests that wait for the batch"),
        _gauge("generation/kv_cache_use_fraction", "1", role, "Share of the KV cache in use"),
        _gauge("generation/version_live", "1", role, "Weight version that samples"),
        _counter("generation/tokens_total", "tokens", role, "Tokens sampled"),
        _counter("generation/prompt_tokens_total", "tokens", role, "Prompt tokens processed"),
        _counter("generation/groups_total", "1", role, "Groups sampled"),
        _counter("generation/retries_total", "1", role, "Groups that went to another worker"),
        _counter("generation/errors_total", "1", role, "Groups that failed", "reason"),
        _counter("generation/segments_total", "1", driver, "Groups sampled, or segments of them"),
        _counter(
            "generation/tokens_kept_total", "tokens", driver, "Tokens before a segment tried again"
        ),
        _counter(
            "generation/tokens_resampled_total", "tokens", driver, "Tokens sampled by tries again"
        ),
        _counter("generation/pulls_total", "1", role, "Weight versions pulled"),
        _counter(
            "generation/preemptions_total", "1", role, "Requests put back for lack of KV cache"
        ),
        _counter("generation/prefix_cache_queries_total", "tokens", role, "Tokens looked up"),
        _counter("generation/prefix_cache_hits_total", "tokens", role, "Tokens found in the cache"),
        _times("generation/group_s", role, "Time of one group, queueing included"),
        _times("generation/pull_s", role, "Time of one pull, reading included"),
        _times("generation/pull_pause_s", role, "Sampling stood still for a pull"),
    )


def _scoring() -> tuple[Metric, ...]:
    role = Role.SCORING
    return (
        _counter("scoring/groups_total", "1", role, "Groups scored"),
        _counter("scoring/errors_total", "1", role, "Groups whose scoring failed", "reason"),
        _counter("scoring/retries_total", "1", role, "Groups whose scoring was tried again"),
        _gauge("scoring/groups_running", "1", role, "Groups being scored"),
        _gauge("scoring/reference_version", "1", role, "Policy version behind the reference"),
        _times("scoring/latency_s", role, "Time of one group, all rewards and models"),
    )


def _buffer() -> tuple[Metric, ...]:
    role, driver = Role.BUFFER, Role.CONTROLLER
    return (
        _counter("buffer/admitted_total", "1", role, "Groups admitted"),
        _counter("buffer/finished_total", "1", role, "Groups generated and scored"),
        _counter("buffer/discarded_total", "1", role, "Groups given up", "reason"),
        _counter("buffer/taken_total", "1", role, "Groups handed to the learner"),
        _counter(
            "buffer/recovered_total", "1", driver, "Groups found on disk, not generated again"
        ),
        _counter(
            "buffer/reweighted_total", "1", role, "Groups over max_staleness that were trained"
        ),
        _gauge("buffer/in_flight", "1", role, "Groups being generated or scored"),
        _gauge("buffer/ready", "1", role, "Finished groups that wait for the learner"),
    )


def _learner() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        _gauge("staleness/mean", "steps", role, "Mean staleness of the step's tokens"),
        _gauge("staleness/max", "steps", role, "Largest staleness of the step's tokens"),
        _gauge("learner/loss", "1", role, "Loss a trained token"),
        _gauge("learner/grad_norm", "1", role, "Gradient norm before clipping"),
        _gauge(
            "learner/grad_norm_part", "1", role, "Gradient norm of one group of parameters", "group"
        ),
        _gauge(
            "learner/params_changed_fraction_bf16",
            "1",
            role,
            "Elements that differ between the last two snapshots, as bfloat16",
        ),
        _gauge("learner/learning_rate", "1", role, "Learning rate of the step"),
        _gauge("learner/entropy", "nats", role, "Mean entropy of the learner's distribution"),
        _gauge("learner/clip_fraction", "1", role, "Tokens whose ratio was clipped"),
        _gauge("learner/kl_ref", "nats", role, "Mean KL to the reference policy (k3, or full)"),
        _gauge(
            "learner/kl_ref_response",
            "nats",
            role,
            "Mean KL to the reference of a whole response (the sum over its tokens)",
        ),
        _gauge("learner/kl_coef", "1", role, "Weight of the KL term, as the controller left it"),
        _gauge("learner/tokens", "tokens", role, "Trained tokens of the step"),
        _gauge("learner/rollouts", "1", role, "Rollouts of the step"),
        _gauge("learner/dropped_rollouts", "1", role, "Rollouts whose advantages are all zero"),
        _gauge("learner/tokens_per_s", "tokens/s", role, "Trained tokens by training time"),
        _gauge(
            "learner/padding_fraction", "1", role, "Share of computed positions without a token"
        ),
        _gauge("learner/micro_batches", "1", role, "Forward passes of one rank in the step"),
        _gauge("learner/skipped_steps", "1", role, "Steps left out so far: gradient not finite"),
        _gauge("learner/prepare_s", "s", role, "Advantages, rows and plan of the step"),
        _gauge("learner/forward_backward_s", "s", role, "Forward and backward passes of the step"),
        _gauge("learner/optimizer_s", "s", role, "Clipping and the optimizer's step"),
    )


def _critic() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        _gauge("critic/loss", "1", role, "Value loss a trained token"),
        _gauge("critic/explained_variance", "1", role, "Share of the returns' variance foretold"),
        _gauge("critic/clip_fraction", "1", role, "Tokens whose value moved out of the clip"),
        _gauge("critic/value_mean", "reward", role, "Mean value at the start of the step"),
        _gauge("critic/return_mean", "reward", role, "Mean return that the values are to be"),
        _gauge("critic/grad_norm", "1", role, "The critic's gradient norm before clipping"),
        _gauge("critic/learning_rate", "1", role, "The critic's learning rate of the step"),
        _gauge("critic/skipped_steps", "1", role, "Critic steps left out: gradient not finite"),
    )


def _importance() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        _gauge("importance/ratio_mean", "1", role, "Mean of learner over sampler probability"),
        _gauge("importance/ratio_max", "1", role, "Largest ratio of the step"),
        _gauge("importance/capped_fraction", "1", role, "Tokens whose weight was capped"),
        _gauge("importance/effective_sample_size", "1", role, "Kish's effective share of tokens"),
        _gauge(
            "importance/logprob_diff_mean",
            "nats",
            role,
            "Mean absolute difference of learner and sampled log-probabilities",
        ),
        _gauge("importance/outside_band_fraction", "1", role, "Tokens with a ratio off the band"),
        _gauge("importance/masked_fraction", "1", role, "Tokens that the correction left out"),
        _gauge("importance/chi_squared", "1", role, "Mean squared ratio less 1"),
        _gauge(
            "importance/log_ratio_p50",
            "nats",
            role,
            "Median size of the log ratio, to within a bin",
        ),
        _gauge(
            "importance/log_ratio_p95", "nats", role, "95th percentile of the size of the log ratio"
        ),
        _gauge("importance/log_ratio_max", "nats", role, "Largest size of a log ratio in the step"),
        _gauge(
            "importance/engine_mismatch_mean",
            "nats",
            role,
            "Mean distance of sampled and exact log-probabilities: engine against learner numerics",
        ),
        _gauge("importance/engine_mismatch_p95", "nats", role, "95th percentile of the same"),
        _gauge("importance/engine_mismatch_max", "nats", role, "Largest of the same"),
        _gauge(
            "importance/staleness_effect_mean",
            "nats",
            role,
            "Mean distance of proximal and exact log-probabilities: what staleness changed",
        ),
        _gauge("importance/staleness_effect_p95", "nats", role, "95th percentile of the same"),
        _gauge("importance/staleness_effect_max", "nats", role, "Largest of the same"),
    )


def _importance_by_label() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        _gauge(
            "importance/outside_fraction_by_rule",
            "1",
            role,
            "Tokens off the band of one rule, where the correction has several",
            "rule",
        ),
        *(
            _gauge(
                f"importance/{name}_by_staleness",
                unit,
                role,
                f"{description}, of tokens of one staleness (0 to 4, 5+)",
                "staleness",
            )
            for name, unit, description in (
                ("ratio_mean", "1", "Mean ratio"),
                ("effective_sample_size", "1", "Effective share"),
                ("chi_squared", "1", "Mean squared ratio less 1"),
                ("outside_band_fraction", "1", "Share with a ratio off the band"),
                ("capped_fraction", "1", "Share whose weight was capped"),
                ("masked_fraction", "1", "Share that the correction left out"),
                ("logprob_diff_mean", "nats", "Mean size of the log ratio"),
                ("log_ratio_p50", "nats", "Median size of the log ratio"),
                ("log_ratio_p95", "nats", "95th percentile of the size of the log ratio"),
                ("log_ratio_max", "nats", "Largest size of the log ratio"),
            )
        ),
    )


def _weights() -> tuple[Metric, ...]:
    role = Role.WEIGHTS
    return (
        _gauge("weights/version_published", "1", role, "Newest version in the store"),
        _gauge("weights/version_live", "1", role, "Newest version live on every worker"),
        _gauge("weights/snapshot_s", "s", role, "Copy of the weights out of the learner"),
        _gauge("weights/publish_s", "s", role, "Write of the last version"),
        _gauge("weights/pull_s", "s", role, "From written to live on every worker"),
        _gauge("weights/bytes", "bytes", role, "Size of the last version"),
        _gauge("weights/stored_bytes", "bytes", role, "Size of the files written for it"),
        _counter("weights/publishes_skipped_total", "1", role, "Due versions never written"),
        _counter("weights/refused_total", "1", role, "Versions that no worker could read whole"),
    )


def _stages() -> tuple[Metric, ...]:
    rows = (*STAGE_ROWS, *PREFERENCE_ROWS)
    return tuple(_gauge(n, unit, Role.LEARNER, text, label) for n, unit, text, label in rows)


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
            *_controller(),
            *_keeping(),
            *_generation(),
            *_scoring(),
            *_buffer(),
            *_learner(),
            *_critic(),
            *_importance(),
            *_importance_by_label(),
            *_weights(),
            *_stages(),
        )
    )
)
