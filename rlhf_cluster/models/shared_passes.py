"""Batching of concurrent calls to one model: waiting calls share its forward passes.

A model serves one thread at a time. Threads enqueue their items. The thread that finds the model free
serves a round: the oldest waiting calls, each with all its items, at most `max_calls` of them, and only
as many as fit into `budget` together. A call never waits for others to fill a round.

Promises:
- with `max_calls` = 1 every call is computed alone, so its result does not depend on concurrent calls,
  not even in the last bits;
- each caller gets the results of its own items, in order;
- if a round fails, its calls are computed again one by one, so that an error reaches only the caller
  whose items caused it. The memory of the failed pass is released first, so that a call that was out of
  memory in the round may fit alone;
- a caller that is not served within `timeout_s` gets `late()`, and its items are not computed unless
  their round has begun. A round whose `compute` itself raised `StalledError` is late for all of its
  calls, which came before it began;
- calls are served in the order in which they came.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from rlhf_cluster.errors import StalledError
from rlhf_cluster.util.waiting import remaining_s

T = TypeVar("T")
R = TypeVar("R")


@dataclass(slots=True, eq=False)
class _Call(Generic[T, R]):
    items: list[T]
    size: int
    found: list[R] = field(default_factory=list)
    error: Exception | None = None
    ended: bool = False


class SharedPasses(Generic[T, R]):
    """Queue of calls in front of one model. Several threads may call it."""

    def __init__(
        self,
        compute: Callable[[list[T]], Sequence[R]],
        *,
        size: Callable[[T], int],
        budget: int,
        max_calls: int,
        timeout_s: float,
        late: Callable[[], Exception],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Set up the queue.

        Args:
            compute: returns one result per item. One thread at a time calls it.
            size: size of an item, such as its tokens, in the unit of `budget`.
            budget: largest total size of the calls of a round; a single call may exceed it.
            max_calls: largest number of calls of a round.
            timeout_s: seconds that a call waits.
            late: makes the error of a call that was not served in time.
        """
        self._compute, self._size, self._budget = compute, size, budget
        self._max_calls, self._timeout_s = max_calls, timeout_s
        self._late, self._clock = late, clock
        self._waiting: deque[_Call[T, R]] = deque()
        self._is_busy = False
        self._changed = threading.Condition()  # never held during a pass
        self.num_calls = self.num_rounds = 0

    def __call__(self, items: Sequence[T]) -> list[R]:
        """Return one result per item.

        Raises what `compute` raises for these items, and `late()` past the deadline.

        Waits for: rounds of other callers, one of which may serve this call too. Unblocked by: the end
        of a round, or the deadline.
        """
        call: _Call[T, R] = _Call(list(items), sum(map(self._size, items)))
        ends_s = self._clock() + remaining_s(self._timeout_s)
        with self._changed:
            self._waiting.append(call)
            self.num_calls += 1
        while (served := self._turn(call, ends_s)) is not None:
            try:
                self._serve(served)
            finally:
                self._end_round(served)
        if call.error is not None:
            raise call.error
        return call.found

    def _turn(self, call: _Call[T, R], ends_s: float) -> list[_Call[T, R]] | None:
        """Return the calls that this thread must serve; None if another thread has served `call`."""
        with self._changed:
            while self._is_busy and not call.ended:
                left_s = ends_s - self._clock()
                if left_s <= 0:
                    if call in self._waiting:
                        self._waiting.remove(call)
                    call.ended = True
                    raise self._late()
                self._changed.wait(left_s)
            if call.ended:
                return None
            self._is_busy = True
            self.num_rounds += 1
            return self._oldest()

    def _oldest(self) -> list[_Call[T, R]]:
        """Take the calls of the next round from the queue."""
        taken = [self._waiting.popleft()]
        filled = taken[0].size
        while self._waiting and len(taken) < self._max_calls:
            filled += self._waiting[0].size
            if filled > self._budget:
                break
            taken.append(self._waiting.popleft())
        return taken

    def _serve(self, calls: Sequence[_Call[T, R]]) -> None:
        try:
            found = list(self._compute([item for call in calls for item in call.items]))
        except StalledError:
            for call in calls:
                call.error, call.ended = self._late(), True
            return
        except Exception as error:
            # the frames of a failed pass hold its memory, which the next one needs
            traceback.clear_frames(error.__traceback__)
            if len(calls) == 1:
                calls[0].error, calls[0].ended = error, True
                return
        else:
            for call in calls:
                call.found, found = found[: len(call.items)], found[len(call.items) :]
                call.ended = True
            return
        for call in calls:
            if not call.ended:
                self._serve([call])

    def _end_round(self, calls: Sequence[_Call[T, R]]) -> None:
        with self._changed:
            self._waiting.extendleft(call for call in reversed(calls) if not call.ended)
            self._is_busy = False
            self._changed.notify_all()
