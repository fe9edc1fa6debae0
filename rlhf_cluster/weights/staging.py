"""Reading a version in a thread of the process that will apply it, while that process goes on to work.

    begin --> report: None ... None --> {"digest": ..., "num_tensors": ...} or {"error": ...}

Promises:
- `begin`, `report` and `cancel` return at once, whatever the storage does;
- reads never overlap: while one hangs in a storage that does not answer, the next is refused;
- what a read raises is its report: an exception would cross process borders as a bare text, and of
  several processes one must be able to refuse before any of them applies.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from rlhf_cluster.weights.transport import Deadline

Report = dict[str, Any]


class Staging:
    """One read at a time, of one process."""

    def __init__(self) -> None:
        self._reading: threading.Thread | None = None
        self._deadline: Deadline | None = None
        self._report: Report | None = None

    def begin(self, read: Callable[[], Report], deadline: Deadline) -> Report | None:
        """Start `read`, which looks at `deadline`. An error where the read before it still hangs."""
        if self._reading is not None and self._reading.is_alive():
            return {"error": "the storage does not answer: an earlier version is still being read"}
        self._report, self._deadline = None, deadline
        self._reading = threading.Thread(target=self._run, args=(read,), name="stage", daemon=True)
        self._reading.start()
        return None

    def report(self) -> Report | None:
        """What the read came to; None while it goes on."""
        return self._report

    def cancel(self) -> None:
        """End the read at its next look at its deadline."""
        if self._deadline is not None:
            self._deadline.cancel()

    def _run(self, read: Callable[[], Report]) -> None:
        try:
            self._report = read()
        except Exception as error:  # whatever it is, who asks for the report is told
            self._report = {"error": f"{type(error).__name__}: {error}"}
