"""Metrics of the stage that makes a data set."""

from __future__ import annotations

from rlhf_cluster.observe.metrics.metric import (
    Role,
    counter,
    gauge,
)

_ROLE = Role.CONTROLLER

GENERATE_ROWS = (
    gauge("generate/prompts", "1", _ROLE, "Prompts of a data set whose answers are written"),
    gauge("generate/samples", "1", _ROLE, "Responses that are written"),
    gauge("generate/reward_mean", "reward", _ROLE, "Mean reward of those since the last record"),
    gauge("generate/best_reward_mean", "reward", _ROLE, "The same of the best of each prompt"),
    gauge("generate/cut_fraction", "1", _ROLE, "The same, share that reached the limit of tokens"),
    gauge("generate/tokens_per_s", "tokens/s", _ROLE, "Tokens of responses by wall time"),
    counter("generate/discarded_total", "1", _ROLE, "Prompts given up", "reason"),
    gauge("generate/revised_reward_mean", "reward", _ROLE, "Mean reward of the last revisions"),
    counter("generate/unrevised_total", "1", _ROLE, "Responses whose revision failed", "reason"),
    counter(
        "generate/unusable_replies_total",
        "1",
        _ROLE,
        "Critiques and revisions without text or end",
        "reason",
    ),
)
