"""The teacher of the scoring pool, and the algorithm that learns from it; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_teacher(c: RunConfig) -> None:
    """Raises `ValueError` for an algorithm without its teacher, and for a teacher of nobody."""
    teacher, needed = c.scoring.teacher, c.algorithm.needs_teacher
    if needed and teacher is None:
        raise ValueError(
            f"algorithm.type = {c.algorithm.type!r} without scoring.teacher: nobody rates the sampled "
            "tokens. Set scoring.teacher to the folder of a model with the policy's tokenizer"
        )
    if teacher is not None and not needed:
        raise ValueError(
            f"scoring.teacher = {teacher!r} with algorithm.type = {c.algorithm.type!r}: that algorithm "
            "does not learn from a teacher. Remove it, or use 'on_policy_distillation'"
        )
