"""The dashboards of single services; `observe.dashboards` has the overview and the table."""

from __future__ import annotations

from rlhf_cluster.observe.panels import Dashboard, Panel, gauge, quantile, rate, ratio, row

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
