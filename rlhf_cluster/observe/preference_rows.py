"""Metrics of the stages on human preferences."""

from __future__ import annotations

from rlhf_cluster.observe.metric import Role, gauge

_ROLE = Role.LEARNER

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
