"""Signals SIGTERM and SIGINT to a driver: a clean end within a notice, or an immediate one."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from rlhf_cluster.errors import RunError

T = TypeVar("T")


async def ended_by_signals(
    run: Coroutine[Any, Any, T],
    stop: Callable[[], bool],
    notice_s: float,
    text: Callable[[], str],
) -> T:
    """Await `run`, let signals end it, and return its result.

    The first signal calls `stop`, which returns whether the run will end itself. If so, the run has
    `notice_s` for that.

    Raises: `RunError` of `text`, when the run is cancelled: after `notice_s`, at a second signal, or
    where `stop` returns False.
    """
    task = asyncio.ensure_future(run)
    loop = asyncio.get_running_loop()
    asked: list[asyncio.TimerHandle] = []

    def on_signal() -> None:
        if asked or not stop():
            task.cancel()
        else:
            asked.append(loop.call_later(notice_s, task.cancel))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        return await task
    except asyncio.CancelledError:
        raise RunError(text()) from None
    finally:
        for handle in asked:
            handle.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
