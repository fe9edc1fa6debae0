"""Grafana dashboards and the only table of their panels.

`deploy/generate.py` writes the files. The overview answers on one screen whether the run learns,
whether it is healthy, and what bounds it. One dashboard per service has the rest.

Every query reads metrics of `rlhf_cluster.observe.metrics.metric_table`, in the way that their
kind asks for, and metrics that the code sends (`tests/unit/observe/test_monitoring.py`). Metrics
have the names that Prometheus gives them, without `ray_rlhf_`. `$run` is the dashboards' variable,
`$__rate_interval` Grafana's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

WIDTH = 24  # of a row, in Grafana's grid

RUN = 'run=~"$run"'

Shape = Literal["curve", "number"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    expr: str
    legend: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """`unit` is Grafana's id of a unit, such as "s" or "percentunit"; `help` says how to read it."""

    title: str
    queries: tuple[Query, ...]
    unit: str = "short"
    help: str = ""
    shape: Shape = "curve"
    width: int = 8
    height: int = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Dashboard:
    """Rows of panels, each row at most `WIDTH` wide."""

    uid: str
    title: str
    help: str
    rows: tuple[tuple[str, tuple[Panel, ...]], ...]

    @property
    def panels(self) -> list[Panel]:
        return [panel for _, row in self.rows for panel in row]


def series(name: str) -> str:
    return f"ray_rlhf_{name}{{{RUN}}}"


def gauge(name: str, legend: str, how: str = "max", by: str = "run") -> Query:
    return Query(expr=f"{how} by ({by}) ({series(name)})", legend=legend)


def rate(name: str, legend: str, by: str = "run") -> Query:
    return Query(expr=f"sum by ({by}) (rate({series(name)}[$__rate_interval]))", legend=legend)


def ratio(part: str, whole: str, legend: str, by: str = "run") -> Query:
    """Of two counters: sums over sums, so that a busy worker counts for more. 0 while the part, which
    has no series before it first grows, has none."""
    above, below = (
        f"sum by ({by}) (rate({series(name)}[$__rate_interval]))" for name in (part, whole)
    )
    return Query(expr=f"({above} or 0 * {below}) / {below}", legend=legend)


def quantile(name: str, q: float, by: str = "run") -> Query:
    inner = f"sum by ({by}, le) (rate({series(f'{name}_bucket')}[$__rate_interval]))"
    return Query(expr=f"histogram_quantile({q}, {inner})", legend=f"{{{{run}}}} p{q * 100:g}")


def share(name: str, legend: str) -> Query:
    return Query(
        expr=f"max by (run) ({series(name)}) / max by (run) ({series('time_step_s')})",
        legend=legend,
    )


def number(title: str, query: Query, unit: str = "short", help: str = "") -> Panel:
    return Panel(
        title=title, queries=(query,), unit=unit, help=help, shape="number", width=4, height=4
    )


def row(title: str, *panels: Panel) -> tuple[str, tuple[Panel, ...]]:
    return title, panels


GENERATION = Dashboard(
    uid="rlhf-generation",
    title="RLHF generation",
    help="The vLLM workers",
    rows=(
        row(
            "Throughput",
            Panel(
                title="Tokens sampled a second",
                queries=(rate("generation_tokens_total", "{{run}} {{worker}}", "run, worker"),),
            ),
            Panel(
                title="Time of a group",
                queries=(
                    quantile("generation_group_s", 0.5),
                    quantile("generation_group_s", 0.95),
                ),
                unit="s",
            ),
            Panel(
                title="Groups sampled a second",
                queries=(rate("generation_groups_total", "{{run}} {{worker}}", "run, worker"),),
            ),
        ),
        row(
            "Engines",
            Panel(
                title="Requests",
                queries=(
                    gauge("generation_requests_running", "{{worker}} running", by="run, worker"),
                    gauge("generation_requests_waiting", "{{worker}} waiting", by="run, worker"),
                ),
            ),
            Panel(
                title="KV cache in use",
                queries=(
                    gauge("generation_kv_cache_use_fraction", "{{worker}}", by="run, worker"),
                ),
                unit="percentunit",
            ),
            Panel(
                title="Errors a second",
                queries=(rate("generation_errors_total", "{{run}} {{reason}}", "run, reason"),),
            ),
        ),
        row(
            "Responses and caches",
            Panel(
                title="Responses a second, by why they ended",
                queries=(rate("generation_responses_total", "{{run}} {{reason}}", "run, reason"),),
            ),
            Panel(
                title="Prefix cache hits, drafts taken",
                queries=(
                    ratio(
                        "generation_prefix_hit_tokens_total",
                        "generation_prefix_tokens_total",
                        "{{run}} prompt tokens in the cache",
                    ),
                    ratio(
                        "generation_draft_accepted_tokens_total",
                        "generation_draft_tokens_total",
                        "{{run}} proposed tokens taken",
                    ),
                ),
                unit="percentunit",
                help="The second needs generation.speculative.",
            ),
            Panel(
                title="Memory of the workers' processes",
                queries=(gauge("generation_resident_bytes", "{{worker}}", by="run, worker"),),
                unit="bytes",
                help="Without the processes that an engine of several parts starts.",
            ),
        ),
        row(
            "Weights",
            Panel(
                title="Live version by worker",
                queries=(gauge("generation_version_live", "{{worker}}", by="run, worker"),),
            ),
            Panel(
                title="Pull, and pause of sampling for it",
                queries=(
                    quantile("generation_pull_s", 0.95),
                    quantile("generation_pull_pause_s", 0.95),
                ),
                unit="s",
            ),
            Panel(
                title="Tokens lost to failed segments a second",
                queries=(rate("generation_tokens_resampled_total", "{{run}}"),),
            ),
        ),
    ),
)

SCORING = Dashboard(
    uid="rlhf-scoring",
    title="RLHF scoring and buffer",
    help="Rewards, the reference, and the experience buffer",
    rows=(
        row(
            "Scoring",
            Panel(
                title="Groups scored a second",
                queries=(rate("scoring_groups_total", "{{run}} {{worker}}", "run, worker"),),
            ),
            Panel(
                title="Time of a group",
                queries=(quantile("scoring_latency_s", 0.5), quantile("scoring_latency_s", 0.95)),
                unit="s",
            ),
            Panel(
                title="Errors a second",
                queries=(rate("scoring_errors_total", "{{run}} {{reason}}", "run, reason"),),
            ),
        ),
        row(
            "Rewards",
            Panel(
                title="Reward of a step",
                queries=(
                    gauge("reward_mean", "{{run}} mean"),
                    gauge("reward_min", "{{run}} min", how="min"),
                    gauge("reward_max", "{{run}} max"),
                    gauge("reward_std", "{{run}} standard deviation"),
                ),
            ),
            Panel(
                title="Groups with equal rewards",
                queries=(gauge("reward_zero_std_groups_fraction", "{{run}}"),),
                unit="percentunit",
            ),
            Panel(
                title="Parts and what is watched",
                queries=(gauge("reward_part", "{{run}} {{part}}", by="run, part"),),
            ),
        ),
        row(
            "Buffer",
            Panel(
                title="Groups a second",
                queries=(
                    rate("buffer_admitted_total", "{{run}} admitted"),
                    rate("buffer_finished_total", "{{run}} finished"),
                    rate("buffer_taken_total", "{{run}} taken"),
                ),
            ),
            Panel(
                title="Discards a second",
                queries=(rate("buffer_discarded_total", "{{run}} {{reason}}", "run, reason"),),
            ),
            Panel(
                title="Staleness",
                queries=(
                    gauge("staleness_mean", "{{run}} mean"),
                    gauge("staleness_max", "{{run}} largest"),
                    gauge("staleness_bound", "{{run}} bound"),
                ),
            ),
        ),
        row(
            "Age and memory",
            Panel(
                title="Rollouts trained a second, by staleness",
                queries=(
                    rate(
                        "staleness_rollouts_total",
                        "{{run}} staleness {{staleness}}",
                        "run, staleness",
                    ),
                ),
                help="Of a group's oldest token, in steps.",
            ),
            Panel(
                title="Age of the oldest group",
                queries=(gauge("buffer_oldest_age_s", "{{run}}"),),
                unit="s",
            ),
            Panel(
                title="Memory of the processes",
                queries=(
                    gauge("scoring_resident_bytes", "{{worker}}", by="run, worker"),
                    gauge("buffer_resident_bytes", "{{run}} buffer"),
                    gauge("learner_resident_bytes", "{{worker}}", by="run, worker"),
                    gauge("run_resident_bytes", "{{run}} driver"),
                ),
                unit="bytes",
            ),
        ),
    ),
)

LEARNER = Dashboard(
    uid="rlhf-learner",
    title="RLHF learner and weights",
    help="Optimisation, importance weights, publishing, checkpoints",
    rows=(
        row(
            "Optimisation",
            Panel(
                title="Loss and gradient norm",
                queries=(
                    gauge("learner_loss", "{{run}} loss"),
                    gauge("learner_grad_norm", "{{run}} gradient norm"),
                ),
            ),
            Panel(
                title="Clipped, masked, capped",
                queries=(
                    gauge("learner_clip_fraction", "{{run}} clipped"),
                    gauge("importance_masked_fraction", "{{run}} masked"),
                    gauge("importance_capped_fraction", "{{run}} capped"),
                ),
                unit="percentunit",
            ),
            Panel(
                title="Effective sample size",
                queries=(
                    gauge("importance_effective_sample_size", "{{run}}", how="min"),
                    gauge(
                        "importance_effective_sample_size_by_staleness",
                        "{{run}} staleness {{staleness}}",
                        by="run, staleness",
                    ),
                ),
                unit="percentunit",
            ),
        ),
        row(
            "Step",
            Panel(
                title="Where a step's time goes",
                queries=(
                    gauge("learner_prepare_s", "{{run}} prepare"),
                    gauge("learner_forward_backward_s", "{{run}} forward and backward"),
                    gauge("learner_optimizer_s", "{{run}} optimizer"),
                    gauge("time_publish_wait_s", "{{run}} copy of the weights"),
                    gauge("time_learner_wait_s", "{{run}} waiting for groups"),
                ),
                unit="s",
            ),
            Panel(
                title="Sampler against learner",
                queries=(
                    gauge("importance_logprob_diff_mean", "{{run}} all tokens"),
                    gauge("importance_engine_mismatch_mean", "{{run}} engine alone"),
                ),
                help="Nats a token. The second needs scoring.exact_logprobs.",
            ),
            Panel(
                title="Skipped steps and restarts",
                queries=(
                    gauge("learner_skipped_steps", "{{run}} skipped"),
                    rate("learner_restarts_total", "{{run}} restarts a second"),
                ),
            ),
        ),
        row(
            "Weights and checkpoints",
            Panel(
                title="Versions",
                queries=(
                    gauge("weights_version_published", "{{run}} published"),
                    gauge("weights_version_live", "{{run}} live"),
                ),
            ),
            Panel(
                title="Publish and pull",
                queries=(
                    gauge("weights_snapshot_s", "{{run}} copy"),
                    gauge("weights_publish_s", "{{run}} write"),
                    gauge("weights_pull_s", "{{run}} until live"),
                ),
                unit="s",
            ),
            Panel(
                title="Last checkpoint",
                queries=(
                    gauge("checkpoint_step", "{{run}} step"),
                    gauge("step_number", "{{run}} now"),
                ),
            ),
        ),
    ),
)

REWARD = Panel(
    title="Reward",
    queries=(
        gauge("reward_mean", "{{run}} step"),
        Query(
            expr=f"max by (run) (avg_over_time({series('reward_mean')}[10m]))",
            legend="{{run}} 10 min",
        ),
        gauge("evaluation_reward_mean", "{{run}} held-out"),
    ),
    help="Is it learning? The mean over 10 minutes should rise; held-out answers are greedy.",
)

WAITS = Panel(
    title="Who waits for whom",
    queries=(
        share("time_learner_wait_s", "{{run}} learner waits"),
        share("time_generation_wait_s", "{{run}} generation waits"),
        share("time_train_s", "{{run}} training"),
    ),
    unit="percentunit",
    help="Shares of the step's wall time. The one that never waits is the bottleneck.",
)

GAINS = Panel(
    title="What one more worker would give",
    queries=(gauge("advisor_gain", "{{run}} {{station}}", by="run, station"),),
    help="Predicted speed over now. 1 is nothing; for the learner: one that is twice as fast.",
)

OVERVIEW = Dashboard(
    uid="rlhf-overview",
    title="RLHF overview",
    help="Is it learning, is it healthy, what is the bottleneck",
    rows=(
        row(
            "Now",
            number("Step", gauge("step_number", "{{run}}")),
            number("Reward now", gauge("reward_mean", "{{run}}")),
            number("Step time", gauge("time_step_s", "{{run}}"), "s"),
            number("Tokens/s", gauge("step_tokens_per_s", "{{run}}")),
            number("Staleness, largest", gauge("staleness_max", "{{run}}")),
            number(
                "Alerts",
                Query(expr='count(ALERTS{alertstate="firing"}) or vector(0)', legend="firing"),
                help="Each has a section in docs/runbook.md.",
            ),
        ),
        row(
            "Is it learning",
            REWARD,
            Panel(
                title="Distance from the reference",
                queries=(
                    gauge("learner_kl_ref_response", "{{run}} KL of a response"),
                    gauge("learner_entropy", "{{run}} entropy"),
                ),
                unit="short",
                help="Nats. KL jumps and entropy towards 0 are bad signs.",
            ),
            Panel(
                title="Response length",
                queries=(gauge("response_length_mean_tokens", "{{run}}"),),
                help="Tokens. A reward that rises with length alone may be a hole in it.",
            ),
        ),
        row(
            "What is the bottleneck",
            WAITS,
            GAINS,
            Panel(
                title="Groups",
                queries=(
                    gauge("buffer_in_flight", "{{run}} in flight"),
                    gauge("buffer_ready", "{{run}} ready"),
                ),
                help="Ready piles up: learner-bound. None ready: generation- or scoring-bound.",
            ),
        ),
        row(
            "Is it healthy",
            Panel(
                title="Workers, and changes by autoscale",
                queries=(
                    gauge("pool_size", "{{run}} {{pool}} live", by="run, pool"),
                    Query(
                        expr=f"sum by (run, pool) (increase({series('pool_autoscaled_total')}[10m]))",
                        legend="{{run}} {{pool}} changed by autoscale",
                    ),
                ),
                help="Changes within 10 minutes; the reason of each is an event of the run.",
            ),
            Panel(
                title="Groups that fail",
                queries=(
                    Query(
                        expr=f"rlhf:generation_failing:fraction10m{{{RUN}}}",
                        legend="{{run}} generation",
                    ),
                    Query(
                        expr=f"rlhf:scoring_failing:fraction10m{{{RUN}}}", legend="{{run}} scoring"
                    ),
                ),
                unit="percentunit",
            ),
            Panel(
                title="Free disk",
                queries=(gauge("run_disk_free_fraction", "{{run}}", how="min"),),
                unit="percentunit",
            ),
        ),
    ),
)

DASHBOARDS: Sequence[Dashboard] = (OVERVIEW, GENERATION, SCORING, LEARNER)
