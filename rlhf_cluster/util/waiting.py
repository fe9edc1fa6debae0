"""Waiting: nested deadlines, and coroutines that run together until one fails.

A caller waits longer than its callee may take. If both deadlines were equal, the caller's would pass
first, since it began first. A worker that is only slow would then look silent, and would be killed with
all its other work before it could report that its call was late. So every wait for a remote call is
`reply_deadline` of the callee's time limit. The deadline around several calls is `reply_deadline` of
their sum.

`tests/unit/util/test_waiting.py` checks the pairs of deadlines in a run's configuration.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from rlhf_cluster.errors import first_failure

_SHARE, _LEAST_S, _MOST_S = 0.1, 0.5, 30.0


def reply_deadline(*inner_s: float) -> float:
    """Return the seconds to wait for consecutive calls that may take `inner_s` seconds each.

    The result is their sum and a margin: 0.5 s plus a tenth of the sum, at most 30 s.
    """
    total_s = sum(inner_s)
    return total_s + min(_MOST_S, _LEAST_S + _SHARE * total_s)


def callee_deadline(outer_s: float) -> float:
    """Return the seconds that a callee may take if its caller waits `outer_s` (`reply_deadline`)."""
    return max(0.0, (outer_s - _LEAST_S) / (1 + _SHARE), outer_s - _MOST_S)


_call_ends: ContextVar[float | None] = ContextVar("call_ends", default=None)


@contextmanager
def call_deadline(seconds: float, clock: Callable[[], float] = time.monotonic) -> Iterator[None]:
    """Limit all waits of this thread inside the block to `seconds` in total (`remaining_s`)."""
    token = _call_ends.set(clock() + seconds)
    try:
        yield
    finally:
        _call_ends.reset(token)


def remaining_s(limit_s: float, clock: Callable[[], float] = time.monotonic) -> float:
    """Return the seconds for one wait: `limit_s`, or what remains of the `call_deadline` around it."""
    ends = _call_ends.get()
    return limit_s if ends is None else max(0.0, min(limit_s, ends - clock()))


T = TypeVar("T")


async def gather_or_cancel(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results in order. The first failure cancels the other coroutines and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as failures:
        raise first_failure(failures) from failures
    return [task.result() for task in tasks]
