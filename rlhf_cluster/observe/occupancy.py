"""Use of a pool of workers, and memory of a process.

Occupancy is the share of time in which the workers of a pool were busy. With n calls in flight at w
workers, min(n, w) of them are busy. Calls that wait for a worker are counted, so a pool that is always
asked for more than it can do is busy all the time.

`busy_s` is the mean over the workers; `idle_s` is the time in which none had a call.
"""

from __future__ import annotations

import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

STATM = Path("/proc/self/statm")


@dataclass(frozen=True, slots=True)
class BusyTime:
    """Seconds since the last `take`. idle_s + busy_s <= the time between the two."""

    idle_s: float
    busy_s: float


@dataclass(slots=True)
class Occupancy:
    """Occupancy of one pool. `num_workers` returns the current number of its workers."""

    clock: Callable[[], float]
    num_workers: Callable[[], int]
    _num_calls: int = 0
    _since_s: float = 0.0
    _idle_s: float = 0.0
    _busy_s: float = 0.0

    def start(self) -> None:
        """Count from now on."""
        self._since_s, self._idle_s, self._busy_s = self.clock(), 0.0, 0.0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Count a call as in flight inside the block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def enter(self) -> None:
        self._advance()
        self._num_calls += 1

    def leave(self) -> None:
        self._advance()
        self._num_calls -= 1

    def take(self) -> BusyTime:
        """Return the time spent since the last `take`, or since `start`."""
        self._advance()
        spent = BusyTime(self._idle_s, self._busy_s)
        self._idle_s = self._busy_s = 0.0
        return spent

    def _advance(self) -> None:
        now = self.clock()
        elapsed, self._since_s = now - self._since_s, now
        if self._num_calls == 0:
            self._idle_s += elapsed
        else:
            self._busy_s += elapsed * min(1.0, self._num_calls / max(1, self.num_workers()))


def resident_bytes(statm: Path = STATM) -> float:
    """Return the bytes of this process in memory, shared pages included; NaN where unknown."""
    try:
        pages = int(statm.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return math.nan
    return float(pages * resource.getpagesize())
