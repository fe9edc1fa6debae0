"""The most private and shared memory that this process held while something ran, above before.

Mapped files do not count: their pages can be dropped, and are the page cache's.
"""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from types import TracebackType

STATUS = Path("/proc/self/status")
_PERIOD_S = 0.002


def held_bytes(status: Path = STATUS) -> int:
    """Bytes of RssAnon and RssShmem."""
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return 1024 * sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem"))


class PeakMemory:
    """Context in which a thread samples; afterwards `peak` has the bytes above those before."""

    def __init__(self) -> None:
        self.peak = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not room for what comes
        self._before = held_bytes()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join(60)
        self.peak = max(self.peak, held_bytes() - self._before)

    def _sample(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.peak = max(self.peak, held_bytes() - self._before)
