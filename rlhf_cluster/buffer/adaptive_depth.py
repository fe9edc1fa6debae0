"""Controller of the pipeline depth, which decides from what the steps measured.

A deeper pipeline hides generation behind training and makes the groups older. Older groups weigh less
in the gradient, which the effective sample size of the importance weights shows. There are two inputs
per step, the means of both in the last `steps` steps, and three zones:

    effective sample size   the learner waits            it does not
    below ess_low           one less                     one less
    up to ess_high          unchanged                    one less
    from ess_high           one more                     unchanged

The depth stays within 0 and `max_staleness`, so the bound never depends on the controller. It raises
the depth only in the zone in which it never lowers it, so it does not swing between two depths. After
a change, the steps that train groups admitted at another depth have no information about the new one.
As many steps as the larger depth are therefore skipped before the mean starts again.

It is pure, without a clock and without waiting. The pipeline reports each step to it.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.sections.rl_run import (
        AdaptiveDepth,
        Staleness,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthChange:
    """A new depth and its reason."""

    before: int
    depth: int
    reason: str

    def __str__(self) -> str:
        return f"pipeline depth {self.before} -> {self.depth}: {self.reason}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthState:
    """State of the controller for a resumed run."""

    depth: int
    seen: tuple[tuple[float, float], ...]
    to_skip: int


@dataclass(slots=True, kw_only=True)
class DepthController:
    """Controller of the depth. Call `step` after each step of the learner.

    `depth` is the current decision.
    """

    depth: int
    max_staleness: int
    thresholds: AdaptiveDepth
    _seen: deque[tuple[float, float]] = field(init=False)
    _to_skip: int = field(init=False)

    def __post_init__(self) -> None:
        self._seen = deque(maxlen=self.thresholds.steps)
        self._to_skip = self.depth

    def step(self, effective_sample_size: float | None, wait_share: float) -> DepthChange | None:
        """Record one more step; return the change of depth that results, if any.

        `effective_sample_size` is a share in (0, 1], None for a step that trained no token.
        `wait_share` is the share of the step's wall time in which the learner waited for groups.
        """
        if self._to_skip > 0:
            self._to_skip -= 1
            return None
        if effective_sample_size is None:
            return None
        self._seen.append((effective_sample_size, wait_share))
        if len(self._seen) < self.thresholds.steps:
            return None
        ess = fmean(ess for ess, _ in self._seen)
        wait = fmean(wait for _, wait in self._seen)
        change, reason = self._decide(ess, wait)
        depth = min(max(self.depth + change, 0), self.max_staleness)
        if depth == self.depth:
            return None
        found = DepthChange(before=self.depth, depth=depth, reason=reason)
        self._to_skip = max(found.before, found.depth)
        self._seen.clear()
        self.depth = depth
        return found

    def state(self) -> DepthState:
        return DepthState(depth=self.depth, seen=tuple(self._seen), to_skip=self._to_skip)

    def load_state(self, state: DepthState) -> None:
        """Restore `state`. The depth stays within the bound of this run."""
        self.depth = min(state.depth, self.max_staleness)
        self._seen.clear()
        self._seen.extend(state.seen)
        self._to_skip = state.to_skip

    def _decide(self, ess: float, wait: float) -> tuple[int, str]:
        """Return -1, 0 or 1, and the reason with its numbers."""
        limits = self.thresholds
        waits = wait > limits.wait_share
        measured = f"effective sample size {ess:.2f}"
        waiting = f"the learner waited {wait:.0%} of the time".replace("%", " %")
        if ess < limits.ess_low:
            return -1, f"{measured} is under {limits.ess_low:g}"
        if ess < limits.ess_high and not waits:
            return -1, f"{measured} is under {limits.ess_high:g} and {waiting}"
        if ess >= limits.ess_high and waits:
            return 1, f"{waiting} and {measured} is not under {limits.ess_high:g}"
        return 0, ""


def depth_controller(settings: Staleness) -> DepthController | None:
    """Return the controller of a run, None if the depth is constant."""
    if settings.adaptive is None:
        return None
    return DepthController(
        depth=settings.pipeline_depth,
        max_staleness=settings.max_staleness,
        thresholds=settings.adaptive,
    )
