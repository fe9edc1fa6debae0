"""Quarantine: rules that drain a worker that still answers, because of its faults or its speed.

    faults      its calls failed for `max_faults` different groups within `window_s`, at least twice
                as many as those of any other worker
    straggler   its median time per token over its last `straggler_groups` groups is more than
                `straggler_factor` times that of all other workers' last groups, and the difference
                is at least `MIN_LOSS_S` per group

- A group that fails on every worker is one fault per worker. An error that all workers have (a bad
  prompt, a lost version) drains none of them.
- The speed of a worker is judged only after `straggler_groups` groups. So a worker that starts, or
  has a single long answer, is not a straggler.
- A factor between times of milliseconds does not make a straggler either: such times depend on the
  machine more than on the worker. `MIN_LOSS_S` excludes them.

The rules have no clock, no waits and no pool. The caller reports every call, and the live workers when
they change. A call costs the same for any number of workers, because all times are kept sorted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlhf_cluster.sections.rl_run import Quarantine

MIN_LOSS_S = 2.0
"""Seconds per group that a straggler costs at least."""


@dataclass(slots=True)
class Watch:
    """Quarantine rules of one pool. Workers are names. Times are seconds of one clock."""

    rules: Quarantine
    _present: frozenset[str] = frozenset()
    _faults: dict[str, dict[str, float]] = field(default_factory=dict)  # worker: group: when
    _served: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)  # seconds, tokens
    _times: list[float] = field(default_factory=list)
    """Seconds per token, sorted, of all calls of live workers that have `straggler_groups` calls."""

    def present(self, workers: Collection[str]) -> None:
        """Set the live workers. Costs a pass over all workers: call it when they change."""
        self._present = frozenset(workers)
        known = (served for name, served in self._served.items() if self._counts(name))
        self._times = sorted(s / n for served in known for s, n in served)

    def fault(self, worker: str, group: str, now_s: float) -> str | None:
        """Record that a call for `group` failed on `worker`. Return why to drain it, or None."""
        self._faults.setdefault(worker, {})[group] = now_s
        limit = self.rules.max_faults
        own = self._num_faults(worker, now_s)
        if not limit or own < limit:
            return None
        others = [name for name in self._faults if name in self._present and name != worker]
        most = max((self._num_faults(name, now_s) for name in others), default=0)
        if 2 * most > own:
            return None
        return (
            f"{own} groups failed on it within {self.rules.window_s:g} s, over "
            f"generation.quarantine.max_faults = {limit} - 1, and at most {most} on any other"
        )

    def served(self, worker: str, seconds: float, tokens: int) -> str | None:
        """Record that `worker` took `seconds` for a group of `tokens` tokens.

        Returns why to drain it, or None.
        """
        count, factor = self.rules.straggler_groups, self.rules.straggler_factor
        if not factor:
            return None
        self._add(worker, seconds, max(1, tokens))
        own = self._served[worker]
        counted = len(own) if self._counts(worker) else 0
        num_others = len(self._times) - counted
        if len(own) < count or not num_others:
            return None
        mine = median(s / n for s, n in own)
        pool = self._median_without([s / n for s, n in own] if counted else [], num_others)
        loss_s = (mine - pool) * median(n for _, n in own)
        if mine <= factor * pool or loss_s < MIN_LOSS_S:
            return None
        return (
            f"it took {1000 * mine:.3g} ms a token over its last {count} groups, and the others "
            f"{1000 * pool:.3g} ms: over generation.quarantine.straggler_factor = {factor:g} times as "
            f"long, {loss_s:.3g} s a group"
        )

    def forget_all_but(self, workers: Collection[str]) -> None:
        """Drop the records of all other workers, which never come back."""
        for gone in (self._faults.keys() | self._served.keys()) - set(workers):
            self.forget(gone)

    def forget(self, worker: str) -> None:
        """Drop the records of a dead or removed worker."""
        if self._counts(worker):
            for seconds, tokens in self._served[worker]:
                del self._times[bisect_left(self._times, seconds / tokens)]
        self._faults.pop(worker, None)
        self._served.pop(worker, None)

    def _counts(self, worker: str) -> bool:
        own = self._served.get(worker, ())
        return worker in self._present and len(own) == self.rules.straggler_groups

    def _add(self, worker: str, seconds: float, tokens: int) -> None:
        """Record one call, in place of the oldest where the worker has `straggler_groups` of them.

        The calls of a worker are in `_times` from the moment that it has `straggler_groups`.
        """
        own = self._served.setdefault(worker, deque())
        counted = self._counts(worker)
        if len(own) == self.rules.straggler_groups:
            gone_s, gone_tokens = own.popleft()
            if counted:
                del self._times[bisect_left(self._times, gone_s / gone_tokens)]
        own.append((seconds, tokens))
        if counted:
            insort(self._times, seconds / tokens)
        elif self._counts(worker):
            for each_s, each_tokens in own:
                insort(self._times, each_s / each_tokens)

    def _median_without(self, own: list[float], num_others: int) -> float:
        """Return the median of `_times` without the values `own`, which are among them."""
        places: list[int] = []
        for value in sorted(own):
            place = bisect_left(self._times, value)
            places.append(max(place, places[-1] + 1) if places else place)

        def other(rank: int) -> float:
            for place in places:
                rank += place <= rank
            return self._times[rank]

        return (other((num_others - 1) // 2) + other(num_others // 2)) / 2

    def _num_faults(self, worker: str, now_s: float) -> int:
        faults, oldest = self._faults.get(worker, {}), now_s - self.rules.window_s
        for group in [group for group, when in faults.items() if when <= oldest]:
            del faults[group]
        return len(faults)
