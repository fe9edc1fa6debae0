"""Decisions to resize a pool by one worker, from the bottleneck advisor's numbers alone.

    grow     the pool is the bottleneck, and one more worker is predicted to make steps `grow_at`
             times as fast: in every part of the advisor's window, and also if engines gain nothing
             while their batch has spare capacity
    shrink   one worker fewer is predicted to make steps at most `shrink_at` times as slow, in every
             part

Promises:
- a pool never exceeds its maximum or falls below its minimum, and the pools never exceed the GPU
  budget that they share. A pool that could grow but for the budget gets the GPU of a pool that can
  spare it; that one drains first;
- one change at a time, by one worker. The next change of a pool comes its cooldown later, and one in
  the other direction `REVERSAL` cooldowns later. Each change is decided from steps made since the
  last change of any pool;
- no flapping: a worker that was removed because of `shrink_at` is predicted to give that much back,
  which is less than `grow_at`. Noise must mislead every part of the window to hide that. Each time
  that a pool changes direction, its next change of direction takes twice as long;
- a worker that gave less than a quarter of the predicted gain (shared cores, few long groups) is
  reported, and the pool does not grow for `HELD` cooldowns;
- every change says why.

Time is an argument. `actors.drivers.supervisor` carries out the changes as it does those of
`rlhf-cluster scale`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_cluster.config.pools import (
    Autoscale,
    PoolScale,
)
from rlhf_cluster.run.bottleneck_advisor import Advice

REVERSAL = 4.0  # cooldowns before a change in the other direction
REFUSED = 4.0  # cooldowns after a change that could not be carried out
HELD = 10.0  # cooldowns without growth after a worker that gave too little
MAX_TURNS = 8  # changes of direction that lengthen the time until the next one
_FULFILLED = 0.25  # share of the predicted gain from which the prediction is accepted


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """Change of a pool to `size` workers. `gain` is the predicted speed over the present one."""

    pool: str
    size: int
    change: int
    gain: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The action to carry out and a note to log, if any."""

    action: Action | None = None
    note: str | None = None


@dataclass(slots=True, kw_only=True)
class _Past:
    """The last change of a pool. `step_s` is the mean time of the steps before it."""

    at_s: float
    action: Action
    step_s: float
    judged: bool


class Autoscaler:
    """Autoscaler of one run. `gpus` is the number of GPUs that one worker of each pool holds."""

    def __init__(self, settings: Autoscale, gpus: Mapping[str, float]) -> None:
        self._settings, self._gpus = settings, dict(gpus)
        self._past: dict[str, _Past] = {}
        self._turns: Counter[str] = Counter()
        self._closed_until: dict[str, float] = {}  # no growth and no shrinking before
        self._held_until: dict[str, float] = {}  # no growth before

    def decide(self, now_s: float, advice: Advice | None, sizes: Mapping[str, int]) -> Decision:
        """Decide on the next change from `advice` about the steps with pools of `sizes`.

        With None, or too few steps, nothing is done. Call `changed` when the action was carried out,
        or `refused` when it could not be.
        """
        if advice is None or advice.num_steps < self._settings.steps:
            return Decision()
        if any(advice.load.workers.get(pool) != size for pool, size in sizes.items()):
            return Decision()  # steps with other pools
        note = self._judge(now_s, advice)
        return Decision(
            action=self._grow(now_s, advice, sizes) or self._shrink(now_s, advice, sizes), note=note
        )

    def changed(self, now_s: float, action: Action, advice: Advice) -> None:
        """Record that `action`, which `advice` led to, was carried out."""
        past = self._past.get(action.pool)
        if past is not None and past.action.change != action.change:
            self._turns[action.pool] += 1
        self._past[action.pool] = _Past(
            at_s=now_s, action=action, step_s=advice.load.step_s, judged=action.change < 0
        )

    def refused(self, now_s: float, action: Action) -> None:
        """Record that `action` failed: no resources were free, or a worker did not start."""
        cooldown_s = self._settings.scales[action.pool].cooldown_s
        self._closed_until[action.pool] = now_s + REFUSED * cooldown_s

    def resized_by_hand(self, now_s: float, pool: str) -> None:
        """Record that another process changed the pool, which then stays as is for its cooldown."""
        scale = self._settings.scales.get(pool)
        if scale is not None:
            self._closed_until[pool] = now_s + scale.cooldown_s
        self._past.pop(pool, None)

    def _grow(self, now_s: float, advice: Advice, sizes: Mapping[str, int]) -> Action | None:
        pool = advice.bound
        if pool is None:
            return self._grow_together(now_s, advice, sizes)
        low = min(part.gain(pool, sure=True) for part in advice.parts)
        if low < self._settings.grow_at or not self._may_grow(now_s, pool, sizes):
            return None
        missing = self._missing_gpus(pool, sizes)
        if missing <= 0:
            size = sizes[pool] + 1
            return Action(
                pool=pool, size=size, change=1, gain=advice.gains[pool], reason=advice.text
            )
        return self._spare(now_s, advice, sizes, pool, missing)

    def _grow_together(
        self, now_s: float, advice: Advice, sizes: Mapping[str, int]
    ) -> Action | None:
        """Grow the first of the pools that bound the run together.

        One worker of either gives nothing alone. After the first has joined, the other pool is the
        bottleneck.
        """
        pools = [p for p in self._settings.scales if p in advice.load.demand]
        low = min(part.speed(dict.fromkeys(pools, 1), sure=True) for part in advice.parts)
        needed = sum(self._gpus.get(pool, 0.0) for pool in pools[1:])
        if (
            len(pools) < 2
            or low < self._settings.grow_at
            or not all(self._may_grow(now_s, pool, sizes) for pool in pools)
            or self._missing_gpus(pools[0], sizes) + needed > 0
        ):
            return None
        names = " and ".join(pools)
        reason = f"{names} bound the run together: a worker more of each gives about {low:.1f}x"
        return Action(pool=pools[0], size=sizes[pools[0]] + 1, change=1, gain=1.0, reason=reason)

    def _may_grow(self, now_s: float, pool: str, sizes: Mapping[str, int]) -> bool:
        """Whether the pool may grow, apart from the GPU budget."""
        scale = self._settings.scales.get(pool)
        if scale is None or sizes[pool] >= scale.maximum:
            return False
        held = now_s < self._held_until.get(pool, now_s)
        return not held and self._open(now_s, pool, scale, 1)

    def _spare(
        self, now_s: float, advice: Advice, sizes: Mapping[str, int], pool: str, missing: float
    ) -> Action | None:
        """Shrink a pool that can spare the GPUs that `pool` needs: the budget is used up."""
        for action in self._shrinkable(now_s, advice, sizes):
            if action.pool != pool and self._gpus.get(action.pool, 0.0) >= missing:
                return Action(
                    pool=action.pool,
                    size=action.size,
                    change=-1,
                    gain=action.gain,
                    reason=f"its GPUs go to {pool}, autoscale.gpu_budget = "
                    f"{self._settings.gpu_budget:g} being used up; {action.reason}",
                )
        return None

    def _shrink(self, now_s: float, advice: Advice, sizes: Mapping[str, int]) -> Action | None:
        found = self._shrinkable(now_s, advice, sizes)
        return max(found, key=lambda action: action.gain, default=None)

    def _shrinkable(self, now_s: float, advice: Advice, sizes: Mapping[str, int]) -> list[Action]:
        found = []
        for pool, scale in self._settings.scales.items():
            if sizes[pool] <= scale.minimum or pool not in advice.load.demand:
                continue
            slowest = min(part.speed({pool: -1}) for part in advice.parts)
            if slowest * self._settings.shrink_at >= 1 and self._open(now_s, pool, scale, -1):
                reason = (
                    f"{pool} is hardly busy: one worker fewer ({sizes[pool]} -> {sizes[pool] - 1}) "
                    f"makes steps at most {1 / slowest:.2f}x as slow"
                )
                size = sizes[pool] - 1
                found.append(Action(pool=pool, size=size, change=-1, gain=slowest, reason=reason))
        return found

    def _open(self, now_s: float, pool: str, scale: PoolScale, change: int) -> bool:
        """Whether the pool may change in the direction of `change` now."""
        if now_s < self._closed_until.get(pool, now_s):
            return False
        past = self._past.get(pool)
        if past is None:
            return True
        turned = past.action.change != change
        cooldowns = REVERSAL * 2.0 ** min(self._turns[pool], MAX_TURNS) if turned else 1.0
        return now_s >= past.at_s + cooldowns * scale.cooldown_s

    def _missing_gpus(self, pool: str, sizes: Mapping[str, int]) -> float:
        if self._settings.gpu_budget is None:
            return -math.inf
        held = sum(size * self._gpus.get(each, 0.0) for each, size in sizes.items())
        return held + self._gpus.get(pool, 0.0) - self._settings.gpu_budget

    def _judge(self, now_s: float, advice: Advice) -> str | None:
        """Compare the last added worker with its prediction; return a note if it gave too little.

        Each is judged once, from the first steps with it. The pool then does not grow for a while.
        """
        for pool, past in self._past.items():
            if past.judged or advice.load.workers.get(pool) != past.action.size:
                continue
            past.judged = True
            gain = past.step_s / advice.load.step_s
            if gain - 1 >= _FULFILLED * (past.action.gain - 1):
                continue
            held_s = HELD * self._settings.scales[pool].cooldown_s
            self._held_until[pool] = now_s + held_s
            return (
                f"{pool} worker {past.action.size} gave {gain:.2f}x, and {past.action.gain:.2f}x was "
                f"foretold: no further one for {held_s:g} s"
            )
        return None
