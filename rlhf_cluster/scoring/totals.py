"""Totals that several threads add to."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Totals:
    def __init__(self) -> None:
        self._values: defaultdict[str, float] = defaultdict(float)
        self._adding = threading.Lock()  # held for an addition only

    def add(self, name: str, amount: float = 1.0) -> None:
        with self._adding:
            self._values[name] += amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add to `seconds/<name>` the time that the block takes, also where it fails."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(f"seconds/{name}", time.perf_counter() - started)

    def read(self) -> dict[str, float]:
        with self._adding:
            return dict(self._values)
