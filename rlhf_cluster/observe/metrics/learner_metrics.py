"""Metrics of the learner: steps, critic, importance correction, and replayed groups."""

from __future__ import annotations

from rlhf_cluster.observe.metrics.metric import (
    Metric,
    Role,
    counter,
    gauge,
)


def _learner() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        gauge("staleness/mean", "steps", role, "Mean staleness of the step's tokens"),
        gauge("staleness/max", "steps", role, "Largest staleness of the step's tokens"),
        gauge("learner/loss", "1", role, "Loss a trained token"),
        gauge("learner/grad_norm", "1", role, "Gradient norm before clipping"),
        gauge(
            "learner/grad_norm_part", "1", role, "Gradient norm of one group of parameters", "group"
        ),
        gauge(
            "learner/params_changed_fraction_bf16",
            "1",
            role,
            "Elements that differ between the last two snapshots, as bfloat16",
        ),
        gauge("learner/learning_rate", "1", role, "Learning rate of the step"),
        gauge("learner/entropy", "nats", role, "Mean entropy of the learner's distribution"),
        gauge("learner/clip_fraction", "1", role, "Tokens whose ratio was clipped"),
        gauge("learner/kl_ref", "nats", role, "Mean KL to the reference policy (k3, or full)"),
        gauge(
            "learner/kl_ref_response",
            "nats",
            role,
            "Mean KL to the reference of a whole response (the sum over its tokens)",
        ),
        gauge("learner/kl_coef", "1", role, "Weight of the KL term, as the controller left it"),
        gauge("learner/tokens", "tokens", role, "Trained tokens of the step"),
        gauge("learner/resident_bytes", "bytes", role, "Memory of the rank's process on its host"),
        gauge("learner/rollouts", "1", role, "Rollouts of the step"),
        gauge("learner/dropped_rollouts", "1", role, "Rollouts whose advantages are all zero"),
        gauge("learner/skipped_steps", "1", role, "Steps left out so far: gradient not finite"),
        gauge("learner/prepare_s", "s", role, "Advantages, rows and plan of the step"),
        gauge("learner/forward_backward_s", "s", role, "Forward and backward passes of the step"),
        gauge("learner/optimizer_s", "s", role, "Clipping and the optimizer's step"),
    )


def _critic() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        gauge("critic/loss", "1", role, "Value loss a trained token"),
        gauge("critic/explained_variance", "1", role, "Share of the returns' variance foretold"),
        gauge("critic/clip_fraction", "1", role, "Tokens whose value moved out of the clip"),
        gauge("critic/value_mean", "reward", role, "Mean value at the start of the step"),
        gauge("critic/return_mean", "reward", role, "Mean return that the values are to be"),
        gauge("critic/grad_norm", "1", role, "The critic's gradient norm before clipping"),
        gauge("critic/learning_rate", "1", role, "The critic's learning rate of the step"),
        gauge("critic/skipped_steps", "1", role, "Critic steps left out: gradient not finite"),
    )


def _importance() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        gauge("importance/ratio_mean", "1", role, "Mean of learner over sampler probability"),
        gauge("importance/ratio_max", "1", role, "Largest ratio of the step"),
        gauge("importance/capped_fraction", "1", role, "Tokens whose weight was capped"),
        gauge("importance/effective_sample_size", "1", role, "Kish's effective share of tokens"),
        gauge(
            "importance/logprob_diff_mean",
            "nats",
            role,
            "Mean absolute difference of learner and sampled log-probabilities",
        ),
        gauge("importance/outside_band_fraction", "1", role, "Tokens with a ratio off the band"),
        gauge("importance/masked_fraction", "1", role, "Tokens that the correction left out"),
        gauge("importance/chi_squared", "1", role, "Mean squared ratio less 1"),
        gauge(
            "importance/log_ratio_p50",
            "nats",
            role,
            "Median size of the log ratio, to within a bin",
        ),
        gauge(
            "importance/log_ratio_p95", "nats", role, "95th percentile of the size of the log ratio"
        ),
        gauge("importance/log_ratio_max", "nats", role, "Largest size of a log ratio in the step"),
        gauge(
            "importance/engine_mismatch_mean",
            "nats",
            role,
            "Mean distance of sampled and exact log-probabilities: engine against learner numerics",
        ),
        gauge("importance/engine_mismatch_p95", "nats", role, "95th percentile of the same"),
        gauge("importance/engine_mismatch_max", "nats", role, "Largest of the same"),
        gauge(
            "importance/staleness_effect_mean",
            "nats",
            role,
            "Mean distance of proximal and exact log-probabilities: what staleness changed",
        ),
        gauge("importance/staleness_effect_p95", "nats", role, "95th percentile of the same"),
        gauge("importance/staleness_effect_max", "nats", role, "Largest of the same"),
    )


def _importance_by_label() -> tuple[Metric, ...]:
    role = Role.LEARNER
    return (
        gauge(
            "importance/outside_fraction_by_rule",
            "1",
            role,
            "Tokens off the band of one rule, where the correction has several",
            "rule",
        ),
        *(
            gauge(
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


LEARNER_ROWS = (*_learner(), *_critic(), *_importance(), *_importance_by_label())

REPLAY_ROWS = (
    gauge("replay/groups", "1", Role.CONTROLLER, "Groups of the step that were trained before"),
    gauge(
        "replay/missing_groups",
        "1",
        Role.CONTROLLER,
        "Groups that the step is smaller by, because too few could be replayed",
    ),
    gauge(
        "replay/uses_mean",
        "1",
        Role.CONTROLLER,
        "Steps that trained one of the step's replayed groups, this one included",
    ),
    gauge(
        "replay/weight_mean",
        "1",
        Role.CONTROLLER,
        "Mean importance weight of the step's replayed groups",
    ),
    counter("buffer/replayed_total", "1", Role.BUFFER, "Groups handed to the learner again"),
    gauge("buffer/replayable", "1", Role.BUFFER, "Trained groups that may be trained again"),
)
