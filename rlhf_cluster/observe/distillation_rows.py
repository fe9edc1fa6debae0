"""Metrics of learning from a teacher, in a stage and by reinforcement learning."""

from __future__ import annotations

from rlhf_cluster.observe.metric import Role, gauge

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
