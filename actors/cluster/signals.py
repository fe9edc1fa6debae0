"""SIGTERM and SIGINT to a driver: an end at the next good moment, or at once."""

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
    """What `run` returns. The first signal calls `stop`, which says whether the run will end by itself;
    then it has `notice_s` for that. The end of that time, a second signal, or a `stop` that says no
    ends it at once, with a `RunError` of `text`."""
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
