"""Metrics of the stages on human preferences: rows like those of `observe.stage_rows`."""

from __future__ import annotations

from rlhf_cluster.observe.stage_rows import Row

PREFERENCE_ROWS: tuple[Row, ...] = (
    ("preference/loss", "1", "Loss of a pair, of a labelled response with KTO", None),
    (
        "preference/accuracy",
        "1",
        "Pairs whose chosen response has the higher implicit reward",
        None,
    ),
    (
        "preference/margin",
        "1",
        "Implicit reward of the chosen response less the rejected one's",
        None,
    ),
    ("preference/chosen_logprob", "nats", "Log-probability of a chosen (desirable) response", None),
    ("preference/rejected_logprob", "nats", "Log-probability of a rejected response", None),
    (
        "preference/chosen_log_ratio",
        "nats",
        "The chosen one's log-probability over the reference's",
        None,
    ),
    ("preference/rejected_log_ratio", "nats", "The rejected one's over the reference's", None),
    (
        "preference/chosen_fell_fraction",
        "1",
        "Chosen responses less likely than under the reference",
        None,
    ),
    ("preference/kl_baseline", "nats", "KTO's KL to the reference, on unmatched responses", None),
    ("ranking/loss", "1", "Loss of a pair of responses", None),
    (
        "ranking/accuracy",
        "1",
        "Pairs whose chosen response scores higher, a tie as half",
        None,
    ),
    ("ranking/margin", "reward", "Score of the chosen response less the rejected one's", None),
    ("ranking/score_mean", "reward", "Mean score of all responses", None),
)
