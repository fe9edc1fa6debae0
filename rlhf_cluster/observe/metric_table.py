"""THE table of metrics: every name that the project sends or writes, once.

A name is `area/quantity_unit`, followed by its label in braces; a counter's ends in `_total`. A metric
without a unit (1) is a plain number or, with `_fraction`, a share between 0 and 1. In Prometheus the
name is `rlhf_area_quantity_unit`. Where names are flat (metrics.jsonl) a labelled metric is written
`area/quantity_unit/label value`. To add a metric, add its row below the role that sends it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from rlhf_cluster.errors import MetricError

TABLE = """
[controller]
reward/mean | reward | Mean reward of the step's rollouts
reward/std | reward | Standard deviation of the step's rewards
reward/min | reward | Smallest reward of the step
reward/max | reward | Largest reward of the step
reward/part{part} | reward | Mean of one part of the reward, or of a watched reward
reward/reasoning_step_mean | reward | Mean reward of a reasoning step
reward/reasoning_steps_mean | 1 | Mean number of reasoning steps scored
reward/zero_std_groups_fraction | 1 | Groups whose rewards are all equal
evaluation/reward_mean | reward | Mean reward of held-out answers, of the first evaluation set
evaluation/part{part} | reward |
    Mean of one part of the reward, or of a watched reward, of held-out answers
evaluation/num_prompts | 1 | Held-out prompts that were answered
evaluation/failed_prompts | 1 | Held-out prompts whose generation or scoring failed
evaluation/set_reward_mean{set} | reward | Mean reward of an evaluation set, over its prompts
evaluation/set_reward_error{set} | reward | Standard error of that mean, over the prompts
evaluation/set_answers{set} | 1 | Answers of an evaluation set
evaluation/set_failed_prompts{set} | 1 | Prompts of an evaluation set without a reward
evaluation/set_length_mean_tokens{set} | tokens | Mean length of the answers of an evaluation set
evaluation/set_version{set} | 1 | Version of the weights that an evaluation set was answered with
evaluation/set_lag_steps{set} | steps |
    Steps that were trained after that version when its point was recorded
evaluation/set_skipped_total{set} | 1 | Due evaluations of a set without a point; the log says why
response/length_mean_tokens | tokens | Mean length of the step's responses
response/length_max_tokens | tokens | Longest response of the step
response/stopped_fraction | 1 | Responses that the model ended itself

[learner]
reward/running_mean{part} | reward | Running mean that normalises a part of the reward
reward/running_std{part} | reward | Running standard deviation that normalises a part of the reward

[controller]
step/number | 1 | Steps done, of learner.epochs * learner.minibatches optimizer steps each
step/groups | 1 | Groups that the step trained on
step/rollouts | 1 | Rollouts that the step trained on
step/response_tokens | tokens | Response tokens of the step
step/tokens_per_s | tokens/s | Response tokens trained by wall time
time/step_s | s | Wall time of the step, waiting included
time/learner_wait_s | s | Time that the learner waited for groups
time/train_s | s | Time that the learner trained
time/publish_wait_s | s | Time that the learner waited for the copy of its weights
time/generation_wait_s | s | Time with no group in flight: generation waited for a slot
time/generation_busy_s | s | Time that a generation worker had a group, mean over workers
time/scoring_busy_s | s | Time that a scoring worker had a group, mean over workers
time/pool_busy_s{pool} | s |
    Time that a worker of a pool of [scoring.pools] had a group, mean over workers
advisor/gain{station} | 1 | Predicted speedup from one more worker (from a learner twice as fast)
staleness/pipeline_depth | steps | How far generation may run ahead
staleness/bound | steps | Largest staleness that is trained
staleness/rollouts_total{staleness} | 1 |
    Rollouts trained, by the staleness of their group's oldest token
run/disk_free_fraction | 1 | Free share of the disk of the run directory
run/sinks_dropped_total | 1 | Sinks of metrics that failed
run/resident_bytes | bytes | Memory of the driver's process

[learner]
staleness/mean | steps | Mean staleness of the step's tokens
staleness/max | steps | Largest staleness of the step's tokens

[controller]
checkpoint/step | 1 | Step of the last complete checkpoint, -1 for none
checkpoint/wait_s | s | Time that the learner waited for the copy of a checkpoint
checkpoint/write_s | s | Time to write the last checkpoint, concurrent with the steps
checkpoint/bytes | bytes | Tensors of the last checkpoint
checkpoint/skipped_total | 1 | Checkpoints skipped because the one before was still being written
checkpoint/failed_total | 1 | Checkpoints that could not be written
checkpoint/copied_step | 1 | Newest step at checkpoint.copy_to, -1 for none
checkpoint/copies_failed_total | 1 | Checkpoints that could not be copied
pool/size{pool} | 1 | Live workers of a pool
pool/behind{pool} | 1 | Workers without the newest weights, which get no work
pool/wanted{pool} | 1 | Workers that a pool should have
pool/restarts_total{pool} | 1 | Workers that were replaced
pool/restarts_recent{pool} | 1 | Workers replaced within cluster.restart_window_s
pool/restarts_allowed{pool} | 1 | Replacements allowed within cluster.restart_window_s
pool/quarantined_total{pool} | 1 | Restarts by a rule of quarantine
pool/autoscaled_total{pool} | 1 | Changes of size by [autoscale]
control/restarts_total | 1 | Control channels reopened after a failure

[controller]
sft/loss | nats | Mean loss per target token in the warm-up
sft/grad_norm | 1 | Gradient norm of a warm-up step, before clipping
sft/grad_norm_part{group} | 1 | Gradient norm of one group of parameters in the warm-up
sft/learning_rate | 1 | Learning rate of a warm-up step
sft/entropy | nats | Mean entropy at a target token in the warm-up
sft/skipped_steps | 1 | 1 when the warm-up step was skipped
sft/tokens | tokens | Target tokens of a warm-up step

[generation]
generation/requests_running | 1 | Requests in the engine's batch
generation/requests_waiting | 1 | Requests that wait for the batch
generation/kv_cache_use_fraction | 1 | Share of the KV cache in use
generation/version_live | 1 | Weight version that samples
generation/tokens_total | tokens | Tokens sampled
generation/prompt_tokens_total | tokens | Prompt tokens, counted once per group
generation/groups_total | 1 | Groups sampled
generation/responses_total{reason} | 1 | Responses, by the reason they ended
generation/prefix_tokens_total | tokens |
    Prompt tokens looked up in the prefix cache, for one sample per request
generation/prefix_hit_tokens_total | tokens | Prompt tokens found in the prefix cache
generation/draft_tokens_total | tokens | Tokens that the draft proposed
generation/draft_accepted_tokens_total | tokens | Proposed tokens that were accepted
generation/resident_bytes | bytes | Memory of the worker's own process
generation/errors_total{reason} | 1 | Groups that failed
generation/pulls_total | 1 | Weight versions pulled
generation/group_s | s | Time of one group, queueing included
generation/pull_s | s | Time of one pull, reading included
generation/pull_pause_s | s | Time that sampling was paused for a pull

[controller]
generation/retries_total | 1 | Groups, or segments, retried
generation/segments_total | 1 | Groups sampled, or segments of them
generation/segments_queued_total | 1 |
    Groups, or segments, at whose end requests waited for the batch
generation/tokens_kept_total | tokens | Tokens kept from before a retried segment
generation/tokens_resampled_total | tokens | Tokens sampled by retries

[scoring]
scoring/groups_total | 1 | Groups scored
scoring/errors_total{reason} | 1 | Groups whose scoring failed
scoring/cache_hits_total | 1 | Scores of rollouts found in the cache
scoring/cache_misses_total | 1 | Scores of rollouts that could be cached and were computed
scoring/watched_errors_total{reward} | 1 | Groups without the score of a watched reward
scoring/groups_running | 1 | Groups being scored
scoring/resident_bytes | bytes | Memory of the worker's own process
scoring/reference_version | 1 | Policy version behind the reference
scoring/latency_s | s | Time of one group at a worker, for everything that it serves

[controller]
scoring/retries_total | 1 | Groups whose scoring was retried

[buffer]
buffer/admitted_total | 1 | Groups admitted
buffer/finished_total | 1 | Groups generated and scored
buffer/discarded_total{reason} | 1 | Groups discarded
buffer/taken_total | 1 | Fresh groups handed to the learner, each once
buffer/reweighted_total | 1 | Groups older than max_staleness that were trained
buffer/in_flight | 1 | Groups being generated or scored
buffer/resident_bytes | bytes | Memory of the buffer's process
buffer/ready | 1 | Finished groups that wait for the learner
buffer/oldest_age_s | s | Age of the oldest admitted group that is not taken
buffer/replayed_total | 1 | Groups handed to the learner again
buffer/replayable | 1 | Trained groups that may be trained again

[controller]
buffer/recovered_total | 1 | Groups recovered from disk instead of generated again
replay/groups | 1 | Groups of the step that were trained before
replay/missing_groups | 1 | Groups missing from the step because too few could be replayed
replay/uses_mean | 1 | Mean number of steps that trained a replayed group, this one included
replay/weight_mean | 1 | Mean importance weight of the step's replayed groups

[controller]
learner/restarts_total | 1 | Restarts of learner and buffer after a failure
learner/ranks | 1 | Ranks that train; fewer than configured after a shrink
learner/spares_ready | 1 | Hot spares that are ready to become ranks

[learner]
learner/loss | 1 | Loss per trained token
learner/grad_norm | 1 | Gradient norm before clipping
learner/grad_norm_part{group} | 1 | Gradient norm of one group of parameters
learner/params_changed_fraction_bf16 | 1 |
    Elements that differ between the last two snapshots, as bfloat16
learner/learning_rate | 1 | Learning rate of the step
learner/entropy | nats | Mean entropy of the learner's distribution
learner/clip_fraction | 1 | Tokens whose ratio was clipped
learner/kl_ref | nats | Mean KL to the reference policy (k3, or full)
learner/kl_ref_response | nats |
    Mean KL to the reference of a whole response (the sum over its tokens)
learner/kl_coef | 1 | Weight of the KL term, as set by its controller
learner/tokens | tokens | Trained tokens of the step
learner/resident_bytes | bytes | Memory of the rank's process on its host
learner/rollouts | 1 | Rollouts of the step
learner/dropped_rollouts | 1 | Rollouts whose advantages are all zero
learner/skipped_steps | 1 | Steps skipped so far because a gradient was not finite
learner/prepare_s | s | Time for advantages, packing and plan of the step
learner/forward_backward_s | s | Time of the step's forward and backward passes
learner/optimizer_s | s | Time of clipping and the optimizer's step

[learner]
critic/loss | 1 | Value loss per trained token
critic/explained_variance | 1 | Share of the returns' variance that the values explain
critic/clip_fraction | 1 | Tokens whose value left the clip range
critic/value_mean | reward | Mean value at the start of the step
critic/return_mean | reward | Mean return, the target of the values
critic/grad_norm | 1 | The critic's gradient norm before clipping
critic/learning_rate | 1 | The critic's learning rate of the step
critic/skipped_steps | 1 | Critic steps skipped because a gradient was not finite

[learner]
importance/ratio_mean | 1 | Mean of learner over sampler probability
importance/ratio_max | 1 | Largest ratio of the step
importance/capped_fraction | 1 | Tokens whose weight was capped
importance/effective_sample_size | 1 | Kish's effective share of tokens
importance/logprob_diff_mean | nats |
    Mean absolute difference of learner and sampled log-probabilities
importance/outside_band_fraction | 1 | Tokens whose ratio is outside the band
importance/masked_fraction | 1 | Tokens masked by the correction
importance/chi_squared | 1 | Mean squared ratio less 1
importance/log_ratio_p50 | nats | Median size of the log ratio, to within a bin
importance/log_ratio_p95 | nats | 95th percentile of the size of the log ratio
importance/log_ratio_max | nats | Largest size of a log ratio in the step
importance/engine_mismatch_mean | nats |
    Mean distance of sampled and exact log-probabilities: engine against learner numerics
importance/engine_mismatch_p95 | nats |
    95th percentile of the distance of sampled and exact log-probabilities
importance/engine_mismatch_max | nats | Largest distance of sampled and exact log-probabilities
importance/staleness_effect_mean | nats |
    Mean distance of proximal and exact log-probabilities: what staleness changed
importance/staleness_effect_p95 | nats |
    95th percentile of the distance of proximal and exact log-probabilities
importance/staleness_effect_max | nats | Largest distance of proximal and exact log-probabilities
importance/outside_fraction_by_rule{rule} | 1 |
    Tokens outside the band of one rule, where the correction has several
importance/ratio_mean_by_staleness{staleness} | 1 |
    Mean ratio, per staleness of a token (0 to 4, 5+)
importance/effective_sample_size_by_staleness{staleness} | 1 |
    Effective share, per staleness of a token (0 to 4, 5+)
importance/chi_squared_by_staleness{staleness} | 1 |
    Mean squared ratio less 1, per staleness of a token (0 to 4, 5+)
importance/outside_band_fraction_by_staleness{staleness} | 1 |
    Share outside the band, per staleness of a token (0 to 4, 5+)
importance/capped_fraction_by_staleness{staleness} | 1 |
    Share whose weight was capped, per staleness of a token (0 to 4, 5+)
importance/masked_fraction_by_staleness{staleness} | 1 |
    Share masked by the correction, per staleness of a token (0 to 4, 5+)
importance/logprob_diff_mean_by_staleness{staleness} | nats |
    Mean size of the log ratio, per staleness of a token (0 to 4, 5+)
importance/log_ratio_p50_by_staleness{staleness} | nats |
    Median size of the log ratio, per staleness of a token (0 to 4, 5+)
importance/log_ratio_p95_by_staleness{staleness} | nats |
    95th percentile of the size of the log ratio, per staleness of a token (0 to 4, 5+)
importance/log_ratio_max_by_staleness{staleness} | nats |
    Largest size of the log ratio, per staleness of a token (0 to 4, 5+)

[weights]
weights/version_published | 1 | Newest version in the store
weights/version_live | 1 | Newest version live on every worker
weights/snapshot_s | s | Time to copy the weights out of the learner
weights/publish_s | s | Time to write the last version
weights/pull_s | s | Time from written to live on every worker
weights/bytes | bytes | Size of the last version
weights/stored_bytes | bytes | Size of the files written for the last version
weights/publishes_skipped_total | 1 | Due versions that were never written
weights/refused_total | 1 | Versions that no worker could read completely

[learner]
stage/loss | 1 | Loss that a step of an offline stage minimised
stage/units | 1 | Dialogues, pairs or rankings that the step trained on
stage/tokens | tokens | Tokens that the step's model read
stage/tokens_per_s | tokens/s | Tokens read by wall time
stage/step_s | s | Wall time of the step
stage/held_out{metric} | 1 | Metric of held-out units; the label is its area.name
stage/data_rows | 1 | Rows read
stage/data_units | 1 | Units made of the rows
stage/data_held_out | 1 | Units held out: evaluated and never trained
stage/data_truncated | 1 | Units cut to data.max_tokens
stage/data_duplicates | 1 | Duplicate units skipped
stage/data_skipped | 1 | Rows and units skipped because they are too long or unusable

[learner]
preference/loss | 1 | Loss per pair, per labelled response with KTO
preference/accuracy | 1 | Pairs whose chosen response has the higher implicit reward
preference/margin | 1 | Implicit reward of the chosen response less the rejected one's
preference/chosen_logprob | nats | Log-probability of a chosen (desirable) response
preference/rejected_logprob | nats | Log-probability of a rejected response
preference/chosen_log_ratio | nats | Log-probability of the chosen response less the reference's
preference/rejected_log_ratio | nats | Log-probability of the rejected response less the reference's
preference/chosen_fell_fraction | 1 | Chosen responses less likely than under the reference
preference/kl_baseline | nats | KTO's KL to the reference, on unmatched responses
preference/pairs | 1 | Pairs of a step of online DPO
preference/tied_groups | 1 | Groups of the step without a pair because all rewards are equal
ranking/loss | 1 | Loss per pair of responses
ranking/accuracy | 1 | Pairs whose chosen response scores higher; a tie counts half
ranking/margin | reward | Score of the chosen response less the rejected one's
grading/loss | 1 | Loss per graded response, mean over its heads
grading/error | 1 | Mean distance of the predicted and the given grade
ranking/score_mean | reward | Mean score of all responses
process/loss | 1 | Cross-entropy per labelled reasoning step
process/accuracy | 1 | Labelled steps classified correctly; a tie counts half
process/label_mean | 1 | Mean label of the step's reasoning steps

[controller]
generate/prompts | 1 | Prompts whose answers are written
generate/samples | 1 | Responses written
generate/reward_mean | reward | Mean reward since the last record
generate/best_reward_mean | reward |
    Mean reward of the best response per prompt since the last record
generate/cut_fraction | 1 | Responses since the last record that reached the token limit
generate/tokens_per_s | tokens/s | Tokens of responses by wall time
generate/discarded_total{reason} | 1 | Prompts discarded
generate/revised_reward_mean | reward | Mean reward of the last revisions
generate/unrevised_total{reason} | 1 | Responses whose revision failed
generate/unusable_replies_total{reason} | 1 | Critiques and revisions without text or without an end

[learner]
distillation/divergence | nats | Mean divergence to the teacher per trained token of a stage
distillation/nll | nats | Mean negative log-likelihood per trained token
distillation/entropy | nats | Mean entropy of the student per trained token
distillation/tokens | tokens | Trained tokens of a step
distillation/teacher_kl | nats | Mean KL of the policy to the teacher per sampled token (k3)
distillation/teacher_gap | nats |
    Mean log-probability of a sampled token, the policy's less the teacher's
"""

DISTRIBUTIONS = frozenset(
    ("generation/group_s", "generation/pull_s", "generation/pull_pause_s", "scoring/latency_s")
)
"""Metrics that are histograms of single durations."""

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class Kind(StrEnum):
    """Way in which the values of a metric add up."""

    GAUGE = "gauge"  # a current value
    COUNTER = "counter"  # a sum that only grows; name ends in _total
    HISTOGRAM = "histogram"  # a distribution of single values


class Role(StrEnum):
    """Service that sends a metric."""

    CONTROLLER = "controller"
    GENERATION = "generation"
    SCORING = "scoring"
    BUFFER = "buffer"
    LEARNER = "learner"
    WEIGHTS = "weights"


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """Row of the table. `unit` is "1" for a number without one; `label` splits the metric."""

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


_ROW = re.compile(r"([a-z]+/[a-z0-9_]+)(?:{([a-z]+)})? \| (\S+) \| (.+)")


def read_table(text: str) -> dict[str, Metric]:
    """Read a table of metrics: rows `name{label} | unit | help` below a line with their [role].

    An indented line continues the row above. Raises `MetricError` for a line that is not a row, and for
    a name that has two rows.
    """
    metrics: dict[str, Metric] = {}
    for metric in _read_rows(text):
        if metric.name in metrics:
            raise MetricError(f"metrics with the same name: {metric.name}. Rename one of them")
        metrics[metric.name] = metric
    return metrics


def _read_rows(text: str) -> Iterator[Metric]:
    heads, role = {f"[{role}]": role for role in Role}, None
    for line in re.sub(r"\n +", " ", text).splitlines():
        if line in heads:
            role = heads[line]
        elif line:
            row = _ROW.fullmatch(line)
            if row is None or role is None:
                raise MetricError(
                    f"{line!r}: a row is `name{{label}} | unit | help` below a [role]"
                )
            yield _metric(row, role)


def _metric(row: re.Match[str], role: Role) -> Metric:
    name, label, unit, help = row.groups()
    kind = Kind.COUNTER if name.endswith("_total") else Kind.GAUGE
    buckets = ()
    if name in DISTRIBUTIONS:
        kind, buckets = Kind.HISTOGRAM, SECONDS
    return Metric(
        name=name, kind=kind, unit=unit, help=help, role=role, label=label, buckets=buckets
    )


METRICS: Mapping[str, Metric] = MappingProxyType(read_table(TABLE))


def find(name: str) -> Metric:
    """Return the metric that `name` (with or without a label value) belongs to.

    Raises `MetricError` for a name that is not in the table.
    """
    metric = METRICS.get(name)
    if metric is not None and metric.label is None:
        return metric
    stem, _, value = name.rpartition("/")
    labelled = METRICS.get(stem)
    if labelled is not None and labelled.label is not None and value:
        return labelled
    if metric is not None:
        raise MetricError(f"metric {name!r} needs a label: write {name}/<{metric.label}>")
    close = difflib.get_close_matches(name, list(METRICS), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise MetricError(
        f"unknown metric {name!r}{hint}. Add a new one to rlhf_cluster/observe/metric_table.py"
    )


def label_value(name: str) -> dict[str, str]:
    """Return the label in a flat name: {"part": "a"} for "reward/part/a", {} without a label."""
    metric = find(name)
    return {metric.label: name[len(metric.name) + 1 :]} if metric.label else {}


def docs_table() -> str:
    """Return the table as Markdown."""
    lines = [
        "| name | Prometheus name | kind | unit | role | label | meaning |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{m.name}` | `{m.prometheus_name}` | {m.kind} | {m.unit} | {m.role} | "
        f"{m.label or ''} | {m.help} |"
        for m in METRICS.values()
    ]
    return "\n".join(lines) + "\n"
