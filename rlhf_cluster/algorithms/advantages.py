"""Advantages from rewards, grouped by id and never by position (numpy).

    A_i = (r_i - mean(group)) / (std(group) + 1e-4)

Promises: a group of one, and a group whose rewards are equal up to rounding, get exactly 0: they
say nothing about which response was better, and rounding noise is not blown up to size one.
Groups may differ in size, and their members may come in any order.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from rlhf_cluster.errors import RecordError

STD_FLOOR = 1e-4
"""Added to the standard deviation, as in the published implementations of GRPO."""

EQUAL_WITHIN = 1e-6
"""Rewards whose spread is under this, relative to the largest of them (or 1), count as equal."""


def group_advantages(
    rewards: Sequence[float], group_ids: Sequence[Hashable], normalize_std: bool
) -> np.ndarray:
    """Centre each reward in its group, and divide by the group's standard deviation if asked.

    The standard deviation has Bessel's correction. Shao et al. 2024, arXiv 2402.03300, eq. 3.

    Args:
        rewards: [N], finite.
        group_ids: [N].
        normalize_std: divide by the standard deviation.

    Returns:
        [N] float32.

    Raises:
        RecordError: lengths that differ, or rewards that are not finite.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.shape != (len(group_ids),):
        raise RecordError(f"{values.size} rewards for {len(group_ids)} group ids; must be equal")
    if not np.isfinite(values).all():
        raise RecordError("rewards must be finite; a failed score is never a number")
    members: dict[Hashable, list[int]] = {}
    for index, group_id in enumerate(group_ids):
        members.setdefault(group_id, []).append(index)
    advantages = np.zeros(len(values), dtype=np.float64)
    for indices in members.values():
        group = values[indices]
        if np.ptp(group) <= EQUAL_WITHIN * max(1.0, float(np.abs(group).max())):
            continue
        centred = group - group.mean()
        advantages[indices] = (
            centred / (group.std(ddof=1) + STD_FLOOR) if normalize_std else centred
        )
    return advantages.astype(np.float32)
