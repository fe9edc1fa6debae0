"""Calls that wait for one model are served together: groups share its forward passes.

A model serves one thread at a time. Threads hand in their items; the one that finds the model free
takes along what waits, the oldest calls first, as whole calls: at most `max_calls` of them, and no
further one that would take their items over `budget`. Nobody waits for company.

Promises:
- with `max_calls` = 1 every call is computed alone, so that no result depends, not in its last bits
  either, on what was asked beside it;
- each caller gets the results of its own items, in order; what fails in company is computed again call
  by call, so that an error reaches the caller whose items it is of, and nobody else; what the failed
  pass held is let go first, so that what was out of memory in company may fit alone;
- a caller that is not served within `timeout_s` gets `late()`, and what it left is not computed, unless
  somebody is at it already. A round whose `compute` itself waited that long (`StalledError`) is late
  for all of its calls, which came before it began;
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
from rlhf_cluster.util.deadlines import left_of_call

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
    """In front of one model. Several threads may call it."""

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
        """`compute` gives a result an item, and is called by one thread at a time. `size` of an item,
        such as its tokens, is in the unit of `budget`."""
        self._compute, self._size, self._budget = compute, size, budget
        self._max_calls, self._timeout_s = max_calls, timeout_s
        self._late, self._clock = late, clock
        self._waiting: deque[_Call[T, R]] = deque()
        self._is_busy = False
        self._changed = threading.Condition()  # held for a look only
        self.num_calls = self.num_rounds = 0

    def __call__(self, items: Sequence[T]) -> list[R]:
        """[len(items)] results, one an item.

        Waits for: rounds of others, of which one may serve this call too. Raises what `compute` raises
        for these items, and `late()` past the deadline.
        """
        call: _Call[T, R] = _Call(list(items), sum(map(self._size, items)))
        ends_s = self._clock() + left_of_call(self._timeout_s)
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
        """The calls that this thread is to serve; None: somebody has served `call`."""
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
