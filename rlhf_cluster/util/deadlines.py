"""How deadlines nest: who waits for a reply waits longer than who works on it may take.

With equal deadlines the one that began first passes first, and it is the caller's: a worker that is
only slow would look silent, and be killed with everything else that it does, before it could say that
its call was late. So every wait for a remote call is `reply_deadline` of what the callee may take, and
the deadline around several of them is the `reply_deadline` of their sum.

`tests/unit/util/test_deadlines.py` walks the pairs of a run's configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_SHARE, _LEAST_S, _MOST_S = 0.1, 0.5, 30.0


def reply_deadline(*inner_s: float) -> float:
    """Seconds to wait for calls, one after another, that may take `inner_s` each: their sum, and a
    margin of half a second and a tenth of it, at most 30 s."""
    total_s = sum(inner_s)
    return total_s + min(_MOST_S, _LEAST_S + _SHARE * total_s)


def callee_deadline(outer_s: float) -> float:
    """The longest that a callee may take whose caller waits `outer_s`, by `reply_deadline`."""
    return max(0.0, (outer_s - _LEAST_S) / (1 + _SHARE), outer_s - _MOST_S)


_call_ends: ContextVar[float | None] = ContextVar("call_ends", default=None)


@contextmanager
def call_deadline(seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """What this thread waits for inside the block, one thing after another, has `seconds` in all."""
    token = _call_ends.set(clock() + seconds)
    try:
        yield
    finally:
        _call_ends.reset(token)


def left_of_call(limit_s: float, clock: Callable[[], float] = time.monotonic) -> float:
    """Seconds for one wait: `limit_s`, or what is left of the `call_deadline` that it is part of."""
    ends = _call_ends.get()
    return limit_s if ends is None else max(0.0, min(limit_s, ends - clock()))
