"""What the ranks of `[learner]` must agree on; called by `config.run`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.sections import Learner

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig


def check_learner(c: RunConfig) -> None:
    """Raises `ValueError` for a smallest number of ranks that nothing would go by."""
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
