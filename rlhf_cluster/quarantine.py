"""Which worker of a pool is drained although it still answers: by its faults, or by its speed.

    faults      its calls failed for `max_faults` different groups within `window_s`, and no other
                worker's for half as many
    straggler   its median time a token over its last `straggler_groups` groups is more than
                `straggler_factor` times that of all other workers' last groups, and the difference
                is at least `MIN_LOSS_S` a group

A group that fails wherever it goes counts once a worker, and an error that all workers meet (a bad
prompt, a lost version) accuses none of them. Each worker has shown what it can do only after
`straggler_groups` groups, so that a start, or a single long answer, is no straggler; and a factor
between times of milliseconds, which say more of the machine than of a worker, is none either.

Pure: no clock, no waiting, no pool; who asks tells of every call, and says who is there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.config.quarantine import Quarantine

MIN_LOSS_S = 2.0
"""A straggler costs at least so many seconds a group."""


@dataclass(slots=True)
class _Seen:
    """Of one worker: when groups failed on it, and (seconds, tokens) of the last that did not."""

    faults: dict[str, float] = field(default_factory=dict)
    served: deque[tuple[float, int]] = field(default_factory=deque)


@dataclass(slots=True)
class Watch:
    """The rules of one pool. Workers are names, and those of `others` are live beside the one asked
    about. Times are seconds of one clock."""

    rules: Quarantine
    _seen: dict[str, _Seen] = field(default_factory=dict)

    def fault(self, worker: str, group: str, now_s: float, others: Collection[str]) -> str | None:
        """A call for `group` failed on `worker`: why that is to be drained, if it is."""
        self._of(worker).faults[group] = now_s
        limit = self.rules.max_faults
        own = self._num_faults(worker, now_s)
        most = max((self._num_faults(name, now_s) for name in others), default=0)
        if not limit or own < limit or 2 * most > own:
            return None
        return (
            f"{own} groups failed on it within {self.rules.window_s:g} s, over "
            f"generation.quarantine.max_faults = {limit} - 1, and at most {most} on any other"
        )

    def served(
        self, worker: str, seconds: float, tokens: int, others: Collection[str]
    ) -> str | None:
        """`worker` took `seconds` for a group of `tokens` tokens: why it is to be drained, if it is."""
        count, factor = self.rules.straggler_groups, self.rules.straggler_factor
        own = self._of(worker).served
        own.append((seconds, max(1, tokens)))
        while len(own) > count:
            own.popleft()
        known = [each for name in others if len(each := self._of(name).served) == count]
        if not factor or len(own) < count or not known:
            return None
        mine = median(s / n for s, n in own)
        pool = median(s / n for served in known for s, n in served)
        loss_s = (mine - pool) * median(n for _, n in own)
        if mine <= factor * pool or loss_s < MIN_LOSS_S:
            return None
        return (
            f"it took {1000 * mine:.3g} ms a token over its last {count} groups, and the others "
            f"{1000 * pool:.3g} ms: over generation.quarantine.straggler_factor = {factor:g} times as "
            f"long, {loss_s:.3g} s a group"
        )

    def forget(self, worker: str) -> None:
        """It is gone."""
        self._seen.pop(worker, None)

    def _of(self, worker: str) -> _Seen:
        return self._seen.setdefault(worker, _Seen())

    def _num_faults(self, worker: str, now_s: float) -> int:
        faults, oldest = self._of(worker).faults, now_s - self.rules.window_s
        for group in [group for group, when in faults.items() if when <= oldest]:
            del faults[group]
        return len(faults)
