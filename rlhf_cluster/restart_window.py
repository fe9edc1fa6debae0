"""Restarts counted within a sliding window of time, so that a budget of them is a rate.

A run of weeks loses a process now and then, whatever its budget over all of its life would be; a crash
loop loses many within the window.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(slots=True)
class RestartWindow:
    """`total` counts since the start, `recent` those of the last `window_s` seconds of `clock`."""

    window_s: float = 3600.0
    clock: Callable[[], float] = time.monotonic
    total: int = 0
    _times: deque[float] = field(default_factory=deque)

    def count(self) -> None:
        """One restart more, now."""
        self.total += 1
        self._times.append(self.clock())

    @property
    def recent(self) -> int:
        oldest = self.clock() - self.window_s
        while self._times and self._times[0] <= oldest:
            self._times.popleft()
        return len(self._times)

    @property
    def until_one_leaves_s(self) -> float:
        """Seconds until the oldest of `recent` leaves the window; 0 without one."""
        return max(0.0, self._times[0] + self.window_s - self.clock()) if self.recent else 0.0
