"""What the ranks of `[learner]` must agree on; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.sections import Learner

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_learner(c: RunConfig) -> None:
    """Raises `ValueError` for spares that nothing would use, and for a smallest number of ranks that
    nothing would go by."""
    _check_spares(c.learner)
    least, ranks, on_loss = c.learner.min_ranks, c.learner.ranks, c.learner.on_loss
    if least > ranks:
        raise ValueError(
            f"learner.min_ranks = {least} is over learner.ranks = {ranks}: no number of ranks is both. "
            "Lower it, or raise learner.ranks"
        )
    if on_loss == "restart" and least != Learner.model_fields["min_ranks"].default:
        raise ValueError(
            f"learner.min_ranks = {least} with learner.on_loss = 'restart': a run never goes on with "
            "fewer ranks then. Remove it, or set on_loss = 'shrink'"
        )


def _check_spares(learner: Learner) -> None:
    if learner.spares > learner.ranks:
        raise ValueError(
            f"learner.spares = {learner.spares} is over learner.ranks = {learner.ranks}: as many "
            "are used after a loss as there are ranks, and the others would never be. Lower it"
        )
    if learner.spares and not learner.max_restarts:
        raise ValueError(
            f"learner.spares = {learner.spares} with learner.max_restarts = 0: the first loss ends the "
            "run, and no spare would ever be used. Remove it, or raise learner.max_restarts"
        )
