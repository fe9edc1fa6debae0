"""What the KL of `[algorithm]` must agree on with the other sections; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.algorithms.kl import LinearKl

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_kl(c: RunConfig) -> None:
    """Raises `ValueError` where nobody would hold the reference that the KL is to."""
    if c.algorithm.full_kl_in is not None:
        _check_full_kl(c)
    elif c.algorithm.needs_reference and not c.scoring.reference:
        if c.algorithm.type == "online_dpo":
            raise ValueError(
                f"algorithm.loss.type = {c.algorithm.loss.type!r} with scoring.reference = false: it "
                "compares with a reference. Set scoring.reference = true, or loss.type = 'simpo'"
            )
        key, value, control = "kl_coef", c.algorithm.kl_coef, c.algorithm.kl_control
        if value == 0 and isinstance(control, LinearKl):
            key, value = "kl_control.final", control.final
        raise ValueError(
            f"algorithm.{key} = {value} needs scoring.reference = true, found false. Turn the "
            f"reference on, or set {key} = 0"
        )


def _check_full_kl(c: RunConfig) -> None:
    key, update = "algorithm.kl_estimator = 'full'", c.scoring.reference_update.type
    if update != "fixed":
        raise ValueError(
            f"{key} with scoring.reference_update.type = {update!r}: the learner's own reference does "
            "not move. Use reference_update.type = 'fixed', or an estimator such as 'k2'"
        )
    if c.sft.steps:
        raise ValueError(
            f"{key} with sft.steps = {c.sft.steps}: the reference would be what the warm-up leaves, "
            "which no checkpoint keeps for a run that goes on. Give the model of a warmed-up run as "
            "model.path and set sft.steps = 0, or use an estimator such as 'k2'"
        )
    if c.learner.backend != "fsdp2":
        raise ValueError(
            f"{key} with learner.backend = {c.learner.backend!r}: the reference is sharded by FSDP2 "
            "only, as a DeepSpeed engine is made for a model that trains. Set learner.backend = "
            "'fsdp2', or use an estimator such as 'k2'"
        )
