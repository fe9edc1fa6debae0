"""The two staleness gates, as pure functions of counters.

staleness = learner version at the time of training - oldest version that sampled a token.

Written with G = groups_per_step, K = max_staleness, W = look_ahead, D = pipeline_depth. `learner`
is the number of steps done, `live` the oldest version that any generation worker can still sample
with. It trails `learner` while a publish or pull is in progress, so live <= learner. `kept` are the
groups admitted and not discarded. `bound` is K, or `stale_limit` with on_stale = "reweight".

Admission. A group may start only while all of these hold:

    kept < (bound + live + 1) * G - (W - 1)      the bound; not with on_stale = "drop"
    kept < (K + learner + 1) * G - (W - 1)       the target; implied by the bound where bound = K
    kept < (D + learner + 1) * G                 the pacing
    learner - live <= K                          with on_stale = "drop" only

Consumption. Of the groups not yet taken let h be the number of the oldest. The learner may take a
finished group with number < h + W, the oldest first, G per step. W = 1 is strict admission order.

The bound: no group is trained with a staleness greater than `bound`. With "wait" and "reweight" this
cannot happen, and raises if it does. With "drop" an older group is discarded instead. The theorem, its
proof, and what breaks it are in docs/staleness.md.

The window moves with the oldest group and never past it, so a group is overtaken by at most W - 1
others. A window of "the first W that are left" would let a slow group be overtaken without end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlhf_cluster.errors import StalenessError
from rlhf_cluster.sections.values import OnStale

if TYPE_CHECKING:
    from rlhf_cluster.config.run_config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionGate:
    """Rule for the number of further groups that may start, given the counters of the buffer.

    A look-ahead greater than `largest_look_ahead` is safe but stalls the run, because complete steps
    are never admitted. The configuration refuses it.
    """

    max_staleness: int
    pipeline_depth: int
    groups_per_step: int
    num_steps: int
    max_in_flight_groups: int | None = None
    look_ahead: int = 1
    on_stale: OnStale = "wait"
    stale_limit: int | None = None  # with on_stale = "reweight", if greater than max_staleness

    @property
    def total_groups(self) -> int:
        """Groups that the run trains on; none is started beyond them."""
        return self.num_steps * self.groups_per_step

    @property
    def bound(self) -> int:
        """Largest staleness that is trained."""
        return self.max_staleness if self.stale_limit is None else self.stale_limit

    def capacity(
        self, *, learner_version: int, live_version: int, num_kept: int, num_in_flight: int
    ) -> int:
        """Return the number of free slots, possibly negative after a resume with smaller limits.

        `num_kept`: groups admitted and not discarded. `num_in_flight`: admitted, not yet finished.
        """
        limits = [
            self._whole_steps(self.max_staleness + learner_version),
            # The pacing bounds no staleness, so it does not allow for groups that are overtaken.
            (self.pipeline_depth + learner_version + 1) * self.groups_per_step,
            self.total_groups,
        ]
        if self.on_stale != "drop":
            limits.append(self._whole_steps(self.bound + live_version))
        elif learner_version - live_version > self.max_staleness:
            # A group of the live version would already be too old when it is finished.
            return 0
        slots = min(limits) - num_kept
        if self.max_in_flight_groups is not None:
            slots = min(slots, self.max_in_flight_groups - num_in_flight)
        return slots

    def latest_step(self, learner_version: int, place: int) -> int:
        """Return the learner's version when a group is trained at the latest.

        `place` is its index among those not yet taken, 0 for the oldest. The group is then overtaken
        by as many others as the window allows.
        """
        return learner_version + (place + self.look_ahead - 1) // self.groups_per_step

    def is_stale(self, oldest_version: int, learner_version: int) -> bool:
        """Whether a group exceeds `max_staleness`. `on_stale` decides what happens to it."""
        return learner_version - oldest_version > self.max_staleness

    def check(self, *, group_id: str, oldest_version: int, learner_version: int) -> int:
        """Return the staleness of a group.

        Raises `StalenessError` when it is greater than the bound or negative.
        """
        staleness = learner_version - oldest_version
        if not 0 <= staleness <= self.bound:
            key = "max_staleness" if self.stale_limit is None else "stale_limit"
            raise StalenessError(
                f"group {group_id} was sampled with version {oldest_version} and the learner is at "
                f"version {learner_version}: staleness {staleness} is outside 0..{self.bound} "
                f"(staleness.{key}). The group was not trained; this is a fault of the system"
            )
        return staleness

    def _whole_steps(self, last_step: int) -> int:
        """Return how many groups may be kept so that none is trained after `last_step`.

        That holds for overtaken groups too.
        """
        return (last_step + 1) * self.groups_per_step - (self.look_ahead - 1)


def build_gate(config: RunConfig) -> AdmissionGate:
    """Build the gate of a run."""
    return AdmissionGate(
        max_staleness=config.staleness.max_staleness,
        pipeline_depth=config.staleness.pipeline_depth,
        groups_per_step=config.fresh_groups,
        num_steps=config.run.steps,
        max_in_flight_groups=config.staleness.max_in_flight_groups,
        look_ahead=config.staleness.look_ahead,
        on_stale=config.staleness.on_stale,
        stale_limit=config.staleness.stale_limit,
    )
