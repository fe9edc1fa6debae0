"""Restarts counted within a sliding window of time, so that a budget of them is a rate.

A run of weeks loses a process now and then, whatever its budget over all of its life would be; a crash
loop loses many within the window.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from rlhf_cluster.errors import RlhfError


@dataclass(slots=True)
class RestartWindow:
    """`total` counts since the start, `recent` those of the last `window_s` seconds of `clock`."""

    window_s: float = 3600.0
    clock: Callable[[], float] = time.monotonic
    total: int = 0
    _counted: deque[tuple[float, RlhfError]] = field(default_factory=deque)  # when, why

    def count(self, cause: RlhfError) -> None:
        """One restart more, now."""
        self.total += 1
        self._counted.append((self.clock(), cause))

    @property
    def recent(self) -> int:
        oldest = self.clock() - self.window_s
        while self._counted and self._counted[0][0] <= oldest:
            self._counted.popleft()
        return len(self._counted)

    @property
    def first_cause(self) -> RlhfError | None:
        """Of `recent`."""
        return self._counted[0][1] if self.recent else None

    @property
    def until_one_leaves_s(self) -> float:
        """Seconds until the oldest of `recent` leaves the window; 0 without one."""
        if not self.recent:
            return 0.0
        return max(0.0, self._counted[0][0] + self.window_s - self.clock())
