"""Time that stands for calls that wait in line."""

from __future__ import annotations

import threading

DEADLINE_S = 60.0  # of what is to happen


class Clock:
    """Time that stands, and tells which threads wait in line: they look at it a second time."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._looks: dict[str, int] = {}
        self._waits: dict[str, threading.Event] = {}

    def __call__(self) -> float:
        name = threading.current_thread().name
        self._looks[name] = self._looks.get(name, 0) + 1
        if self._looks[name] == 2:
            self.waits(name).set()
        return self.now_s

    def waits(self, name: str) -> threading.Event:
        return self._waits.setdefault(name, threading.Event())
