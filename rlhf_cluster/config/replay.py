"""[buffer.replay]: groups of earlier steps among those of a step; what follows for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from rlhf_cluster.config.base import Section

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig

Priority = Literal["uniform", "reward_spread"]


class Replay(Section):
    """Groups are trained more than once. Without this section each is trained exactly once."""

    fraction: float = Field(default=0.25, gt=0, lt=1)
    """Part of `run.groups_per_step` that was trained before, rounded to whole groups. The others are
    fresh; a step that finds too few groups to replay is smaller, and has as many fresh ones."""
    max_uses: int = Field(default=2, ge=2)
    """How many steps may train a group in all."""
    priority: Priority = "uniform"
    """`uniform`: each group that may be replayed is as likely. `reward_spread`: one is likelier, the
    further its rewards are from their mean (their mean absolute deviation)."""
    alpha: float = Field(default=0.6, gt=0)
    """With priority = "reward_spread" only: the exponent of the spread."""
    beta: float = Field(default=1.0, ge=0, le=1)
    """With priority = "reward_spread" only: exponent of the importance weight that makes up for being
    likelier. 1: the gradient of replayed groups is, on average, that of uniform replay."""

    def num_replayed(self, groups_per_step: int) -> int:
        """Groups of a step that are to be replayed ones."""
        return round(self.fraction * groups_per_step)


def fresh_groups(c: RunConfig) -> int:
    """Groups of each step that no step has trained before. Admission and the bound count these."""
    groups, replay = c.run.groups_per_step, c.buffer.replay
    return groups if replay is None else groups - replay.num_replayed(groups)
