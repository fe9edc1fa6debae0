"""Index of the live workers of a pool by how much they have in flight.

Promises:
- a worker that changes is at once listed under its new load, whichever code changed it;
- finding the least loaded worker, and reporting a change, cost (nearly) the same with ten workers as
  with a thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from enum import StrEnum
from heapq import heappop, heappush
from typing import Any


class State(StrEnum):
    LIVE = "live"
    BEHIND = "behind"  # healthy, without the newest weights: gets no work until it has them
    DRAINING = "draining"
    RETIRED = "retired"


class Worker:
    """One actor and what its pool knows of it.

    `changed` is called on every change of state or load.
    """

    __slots__ = ("_num_in_flight", "_state", "actor", "changed", "name", "placement")

    def __init__(self, *, name: str, actor: Any, placement: Any) -> None:
        self.name, self.actor, self.placement = name, actor, placement
        self.changed: Callable[[Worker], None] = lambda worker: None
        self._num_in_flight, self._state = 0, State.LIVE

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    @num_in_flight.setter
    def num_in_flight(self, number: int) -> None:
        self._num_in_flight = number
        self.changed(self)

    @property
    def state(self) -> State:
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._state = state
        self.changed(self)


@dataclass(slots=True)
class Loads:
    """Live workers by load. Workers that are not live are not in it.

    Among workers with equal loads the one that came first is first.
    """

    changes: int = 0  # how often a worker came or went
    _entries: dict[Worker, tuple[int, int, Worker]] = field(default_factory=dict)
    """(load, number of its coming, worker) by live worker."""
    _heap: list[tuple[int, int, Worker]] = field(default_factory=list)
    """Entries, each once. One that is not in `_entries` is outdated, and ignored."""
    _in_heap: set[tuple[int, int, Worker]] = field(default_factory=set)

    def __len__(self) -> int:
        """Return the number of live workers."""
        return len(self._entries)

    def update(self, worker: Worker) -> None:
        """List `worker` under its current load, or remove it if it is not live."""
        listed = self._entries.pop(worker, None)
        is_live = worker.state is State.LIVE
        if is_live:
            number = self.changes if listed is None else listed[1]
            self._entries[worker] = (worker.num_in_flight, number, worker)
            self._push(self._entries[worker])
        self.changes += is_live != (listed is not None)

    def has_room(self, limit: int | None) -> bool:
        """Whether a live worker has less than `limit` in flight."""
        first = self._first()
        return first is not None and (limit is None or first[0] < limit)

    def least(self, limit: int | None, avoid: Collection[Worker] = ()) -> Worker:
        """Return the least loaded worker; one of `avoid` only if no other has capacity.

        At least one worker must have capacity.
        """
        passed: list[tuple[int, int, Worker]] = []
        while (entry := self._first()) is not None and entry[2] in avoid:
            passed.append(self._pop())
        if entry is None or (limit is not None and entry[0] >= limit):
            entry = passed[0]
        for each in passed:
            self._push(each)
        return entry[2]

    def _first(self) -> tuple[int, int, Worker] | None:
        while self._heap and self._entries.get(self._heap[0][2]) != self._heap[0]:
            self._pop()
        return self._heap[0] if self._heap else None

    def _push(self, entry: tuple[int, int, Worker]) -> None:
        if entry not in self._in_heap:
            self._in_heap.add(entry)
            heappush(self._heap, entry)

    def _pop(self) -> tuple[int, int, Worker]:
        entry = heappop(self._heap)
        self._in_heap.remove(entry)
        return entry
