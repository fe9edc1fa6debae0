"""Numbers that follow from several sections of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_cluster.config.pool_sections import REFERENCE

if TYPE_CHECKING:
    from rlhf_cluster.config.run_config import RunConfig


def fresh_groups(c: RunConfig) -> int:
    """Groups of each step that no step has trained before. Admission and the bound count these."""
    groups, replay = c.run.groups_per_step, c.buffer.replay
    return groups if replay is None else groups - replay.num_replayed(groups)


def largest_look_ahead(*, max_staleness: int, publish_every: int, groups_per_step: int) -> int:
    """The largest window with which the learner always gets a whole step of groups.

    While it waits at version s, the newest version that gets live is at least
    s - (publish_every - 1); the bound must admit (s + 1) * groups_per_step groups then.
    """
    return (max_staleness + 1 - publish_every) * groups_per_step + 1


def kl_notes(c: RunConfig) -> list[str]:
    """What of the KL to the reference is no distance between policies, for people."""
    scoring = c.scoring.of_pool(c.scoring.pool_of(REFERENCE))
    if not (c.algorithm.needs_reference and c.scoring.reference):
        return []
    if scoring.dtype == c.learner.dtype:
        return []
    return [
        f"scoring.dtype = {scoring.dtype!r} of the reference with learner.dtype = "
        f"{c.learner.dtype!r}: equal policies are not at a distance of 0 from it, and training "
        "follows the rounding too. Make them equal"
    ]
