"""The two staleness gates, as pure functions of counters.

staleness = learner version at the time of training - oldest version that sampled a token.

Admission. A new group may start only while

    admitted - discarded < (max_staleness + live_version + 1) * groups_per_step      (the bound)
    admitted - discarded < (pipeline_depth + learner_version + 1) * groups_per_step  (the pacing)

`live_version` is the oldest version that any generation worker can still sample with, so it trails
`learner_version` while a publish or pull is under way.

Consumption. The learner takes groups in admission order, `groups_per_step` a step.

Why the bound holds: let a group be admitted while `live_version = v`, with fewer than
(max_staleness + v + 1) * groups_per_step groups admitted and not discarded. Admission order and
whole steps put it into step floor(place / groups_per_step) <= max_staleness + v, and later discards
only move it forward. The learner's version before step k is k, and each of the group's tokens is
sampled with version v or later. So its staleness is at most max_staleness. Taking groups in the
order in which they complete would break this: a slow group could slip arbitrarily many steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_cluster.errors import StalenessError


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionGate:
    """How many further groups may start, given the counters of the buffer."""

    max_staleness: int
    pipeline_depth: int
    groups_per_step: int
    num_steps: int
    max_in_flight_groups: int | None = None

    @property
    def total_groups(self) -> int:
        """Groups that the run trains on in all; none is started beyond them."""
        return self.num_steps * self.groups_per_step

    def capacity(
        self, *, learner_version: int, live_version: int, num_kept: int, num_in_flight: int
    ) -> int:
        """Free slots, possibly negative after a resume with smaller limits.

        `num_kept`: groups admitted and not discarded. `num_in_flight`: admitted, not yet finished.
        """
        bound = (self.max_staleness + live_version + 1) * self.groups_per_step
        pacing = (self.pipeline_depth + learner_version + 1) * self.groups_per_step
        slots = min(bound, pacing, self.total_groups) - num_kept
        if self.max_in_flight_groups is not None:
            slots = min(slots, self.max_in_flight_groups - num_in_flight)
        return slots


def check_staleness(
    *, group_id: str, oldest_version: int, learner_version: int, max_staleness: int
) -> int:
    """The staleness of a group. Raises `StalenessError` when it is over the bound or negative."""
    staleness = learner_version - oldest_version
    if not 0 <= staleness <= max_staleness:
        raise StalenessError(
            f"group {group_id} was sampled with version {oldest_version} and the learner is at "
            f"version {learner_version}: staleness {staleness} is outside 0..{max_staleness} "
            "(staleness.max_staleness). The group was not trained; this is a fault of the system"
        )
    return staleness
