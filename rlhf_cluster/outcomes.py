"""How many of the last groups failed, and when that is too many for the run to go on."""

from __future__ import annotations

from collections import deque

from rlhf_cluster.errors import RlhfError

WINDOW = 100
LEAST = 8
"""Groups before which no share of failures ends the run."""


class Outcomes:
    """The last `WINDOW` groups. `max_error_rate` is the run's `scoring.max_error_rate`."""

    def __init__(self, max_error_rate: float) -> None:
        self._max_error_rate = max_error_rate
        self._failed: deque[bool] = deque(maxlen=WINDOW)

    def add(self, error: RlhfError | None) -> None:
        """One more group; `error` is what it failed with. Raises an error of its kind when more than
        `max_error_rate` of the last groups failed."""
        self._failed.append(error is not None)
        rate = sum(self._failed) / len(self._failed)
        if error is not None and len(self._failed) >= LEAST and rate > self._max_error_rate:
            raise type(error)(
                f"{rate:.0%} of the last {len(self._failed)} groups failed, over "
                f"scoring.max_error_rate = {self._max_error_rate:g}. The last reason: {error}"
            )
