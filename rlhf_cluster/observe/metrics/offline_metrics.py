"""Metrics of offline stages, and of distillation from a teacher in a stage or by RL.

They cover every stage, preference learning, and process reward models.
"""

from __future__ import annotations

from rlhf_cluster.observe.metrics.metric import (
    Role,
    gauge,
)

_ROLE = Role.LEARNER

DISTILLATION_ROWS = (
    gauge(
        "distillation/divergence",
        "nats",
        _ROLE,
        "Mean divergence to the teacher at a trained token of a stage",
    ),
    gauge("distillation/nll", "nats", _ROLE, "Mean negative log-likelihood of a trained token"),
    gauge("distillation/entropy", "nats", _ROLE, "Mean entropy of the student at a trained token"),
    gauge("distillation/tokens", "tokens", _ROLE, "Trained tokens of a step"),
    gauge(
        "distillation/teacher_kl",
        "nats",
        _ROLE,
        "Mean KL of the policy to the teacher at a sampled token (k3)",
    ),
    gauge(
        "distillation/teacher_gap",
        "nats",
        _ROLE,
        "Mean log-probability of a sampled token, the policy's less the teacher's",
    ),
)

PREFERENCE_ROWS = (
    gauge("preference/loss", "1", _ROLE, "Loss of a pair, of a labelled response with KTO"),
    gauge(
        "preference/accuracy",
        "1",
        _ROLE,
        "Pairs whose chosen response has the higher implicit reward",
    ),
    gauge(
        "preference/margin",
        "1",
        _ROLE,
        "Implicit reward of the chosen response less the rejected one's",
    ),
    gauge(
        "preference/chosen_logprob",
        "nats",
        _ROLE,
        "Log-probability of a chosen (desirable) response",
    ),
    gauge("preference/rejected_logprob", "nats", _ROLE, "Log-probability of a rejected response"),
    gauge(
        "preference/chosen_log_ratio",
        "nats",
        _ROLE,
        "The chosen one's log-probability over the reference's",
    ),
    gauge(
        "preference/rejected_log_ratio", "nats", _ROLE, "The rejected one's over the reference's"
    ),
    gauge(
        "preference/chosen_fell_fraction",
        "1",
        _ROLE,
        "Chosen responses less likely than under the reference",
    ),
    gauge(
        "preference/kl_baseline", "nats", _ROLE, "KTO's KL to the reference, on unmatched responses"
    ),
    gauge("preference/pairs", "1", _ROLE, "Pairs of a step of online DPO"),
    gauge(
        "preference/tied_groups",
        "1",
        _ROLE,
        "Groups of the step that gave no pair: all rewards equal",
    ),
    gauge("ranking/loss", "1", _ROLE, "Loss of a pair of responses"),
    gauge(
        "ranking/accuracy", "1", _ROLE, "Pairs whose chosen response scores higher, a tie as half"
    ),
    gauge(
        "ranking/margin", "reward", _ROLE, "Score of the chosen response less the rejected one's"
    ),
    gauge("grading/loss", "1", _ROLE, "Loss of a graded response, a mean over its heads"),
    gauge("grading/error", "1", _ROLE, "Mean distance of what is said of a grade and the grade"),
    gauge("ranking/score_mean", "reward", _ROLE, "Mean score of all responses"),
)

PROCESS_ROWS = (
    gauge("process/loss", "1", _ROLE, "Cross-entropy of a labelled reasoning step"),
    gauge(
        "process/accuracy", "1", _ROLE, "Labelled steps that are told right from wrong, a tie half"
    ),
    gauge("process/label_mean", "1", _ROLE, "Mean label of the step's reasoning steps"),
)

STAGE_ROWS = (
    gauge("stage/loss", "1", _ROLE, "The loss that a step of an offline stage descended"),
    gauge("stage/units", "1", _ROLE, "Dialogues, pairs or rankings that the step trained on"),
    gauge("stage/tokens", "tokens", _ROLE, "Tokens that the step's model read"),
    gauge("stage/tokens_per_s", "tokens/s", _ROLE, "Tokens read by wall time"),
    gauge("stage/step_s", "s", _ROLE, "Wall time of the step"),
    gauge(
        "stage/held_out", "1", _ROLE, "A metric of held-out units, area.name in the label", "metric"
    ),
    gauge("stage/data_rows", "1", _ROLE, "Rows that were read"),
    gauge("stage/data_units", "1", _ROLE, "Units made of them"),
    gauge("stage/data_held_out", "1", _ROLE, "Units that are evaluated on and never trained"),
    gauge("stage/data_truncated", "1", _ROLE, "Units cut to data.max_tokens"),
    gauge("stage/data_duplicates", "1", _ROLE, "Units left out because they were there before"),
    gauge("stage/data_skipped", "1", _ROLE, "Rows and units left out: too long, or of no use"),
)
