"""Metrics of the stage that trains process reward models."""

from __future__ import annotations

from rlhf_cluster.observe.metric import Role, gauge

_ROLE = Role.LEARNER

PROCESS_ROWS = (
    gauge("process/loss", "1", _ROLE, "Cross-entropy of a labelled reasoning step"),
    gauge(
        "process/accuracy", "1", _ROLE, "Labelled steps that are told right from wrong, a tie half"
    ),
    gauge("process/label_mean", "1", _ROLE, "Mean label of the step's reasoning steps"),
)
