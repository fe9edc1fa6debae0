"""Groups that wait for one model share its passes, and nothing else."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf_cluster.errors import ScoringError, StalledError
from rlhf_cluster.models.shared_passes import SharedPasses
from tests.support.builders.waiting_calls import (
    DEADLINE_S,
    Clock,
)


class Line:
    """A model that is busy with `first` until the block ends; then those that came meanwhile."""

    def __init__(self, compute: Callable[[list[Any]], list[Any]], **settings: Any) -> None:
        self.rounds: list[list[Any]] = []
        self.clock, self.begun, self.free = Clock(), threading.Event(), threading.Event()
        self.gave_up = threading.Event()
        self.results: dict[str, Any] = {}
        self._compute, self._threads = compute, []
        self.model: SharedPasses[Any, Any] = SharedPasses(
            self._served,
            size=settings.pop("size", lambda item: 1),
            budget=settings.pop("budget", 100),
            max_calls=settings.pop("max_calls", 100),
            timeout_s=10.0,
            late=lambda: ScoringError("busy for 10 s"),
            clock=self.clock,
        )

    def _served(self, items: list[Any]) -> list[Any]:
        self.rounds.append(items)
        if items == ["first"]:
            self.begun.set()
            assert self.free.wait(DEADLINE_S)
            return ["FIRST"]
        return self._compute(items)

    @contextmanager
    def busy(self) -> Iterator[None]:
        self._start("first", ["first"])
        assert self.begun.wait(DEADLINE_S)
        yield
        self.free.set()
        for thread in self._threads:
            thread.join(DEADLINE_S)
            assert not thread.is_alive()

    def ask(self, name: str, items: list[Any]) -> None:
        """In a thread; returns once it waits in line."""
        self._start(name, items)
        assert self.clock.waits(name).wait(DEADLINE_S)

    def _start(self, name: str, items: list[Any]) -> None:
        def call() -> None:
            try:
                self.results[name] = self.model(items)
            except Exception as error:
                self.results[name] = error
                self.gave_up.set()

        self._threads.append(threading.Thread(target=call, name=name, daemon=True))
        self._threads[-1].start()


def doubled(items: list[int]) -> list[int]:
    if any(item < 0 for item in items):
        raise ScoringError(f"below 0: {items}")
    return [2 * item for item in items]


def test_calls_that_wait_are_served_in_one_round_each_with_its_own():
    line = Line(doubled)
    with line.busy():
        line.ask("a", [1, 2])
        line.ask("b", [])
        line.ask("c", [3])
    assert line.rounds == [["first"], [1, 2, 3]]
    assert line.results == {"first": ["FIRST"], "a": [2, 4], "b": [], "c": [6]}
    assert (line.model.num_calls, line.model.num_rounds) == (4, 2)


@pytest.mark.parametrize(
    ("settings", "rounds"),
    [
        ({"max_calls": 1}, [[1], [2], [3], [4]]),
        ({"max_calls": 2}, [[1, 2], [3, 4]]),
        ({"budget": 3, "size": lambda item: 1 if item == "first" else item}, [[1, 2], [3], [4]]),
    ],
)
def test_the_oldest_go_first_as_many_as_fit(settings, rounds):
    line = Line(doubled, **settings)
    with line.busy():
        for item in (1, 2, 3, 4):
            line.ask(str(item), [item])
    assert line.rounds == [["first"], *rounds]
    assert [line.results[str(item)] for item in (1, 2, 3, 4)] == [[2], [4], [6], [8]]


def test_an_error_stays_with_whom_it_belongs_to():
    line = Line(doubled)
    with line.busy():
        line.ask("a", [1])
        line.ask("bad", [2, -1])
        line.ask("c", [3])
    assert str(line.results.pop("bad")) == "below 0: [2, -1]"
    assert line.results == {"first": ["FIRST"], "a": [2], "c": [6]}
    assert line.rounds == [["first"], [1, 2, -1, 3], [1], [2, -1], [3]]


def test_what_a_failed_round_held_is_let_go_before_its_calls_are_computed_alone():
    class Activations:
        """Memory of a pass."""

    held: list[weakref.ref[Activations]] = []

    def compute(items: list[int]) -> list[int]:
        assert not any(own() for own in held)
        activations = Activations()
        held.append(weakref.ref(activations))
        if len(items) > 1 or items == [2]:
            raise MemoryError(f"no memory for {items}")
        return doubled(items)

    line = Line(compute)
    with line.busy():
        for item in (1, 2, 3):
            line.ask(str(item), [item])
    assert len(held) == 4
    error = line.results.pop("2")
    assert str(error) == "no memory for [2]"
    assert error.__context__ is None
    assert line.results == {"first": ["FIRST"], "1": [2], "3": [6]}


def test_a_round_that_waited_past_the_deadline_is_late_for_all_and_not_tried_again():
    def compute(items: list[int]) -> list[int]:
        raise StalledError("the model was held")

    line = Line(compute)
    with line.busy():
        line.ask("a", [1])
        line.ask("b", [2])
    assert line.rounds == [["first"], [1, 2]]
    assert [str(line.results[name]) for name in "ab"] == ["busy for 10 s"] * 2
    assert line.results["a"] is not line.results["b"]


def test_who_gave_up_while_it_was_computed_is_not_computed_again():
    line = Line(doubled)
    begun, free = threading.Event(), threading.Event()

    def compute(items: list[int]) -> list[int]:
        if len(items) > 1:
            begun.set()
            assert free.wait(DEADLINE_S)
            raise ScoringError("in company")
        return doubled(items)

    line._compute = compute
    with line.busy():
        line.ask("a", [1])
        line.clock.now_s = 5.0
        line.ask("b", [2])
        line.free.set()
        assert begun.wait(DEADLINE_S)  # "a" or "b" serves both, and the other one waits
        line.clock.now_s = 20.0
        with line.model._changed:
            line.model._changed.notify_all()  # as time passes
        assert line.gave_up.wait(DEADLINE_S)
        free.set()
    late = [name for name in "ab" if isinstance(line.results[name], ScoringError)]
    assert len(late) == 1
    served = {"a": 1, "b": 2}
    del served[late[0]]
    [(name, item)] = served.items()
    assert line.rounds == [["first"], [1, 2], [item]]
    assert line.results[name] == [2 * item]


def test_who_waited_too_long_is_told_and_is_not_computed():
    line = Line(doubled)
    with line.busy():
        line.clock.now_s = 5.0
        line.ask("a", [1])
        line.clock.now_s = 15.0
        with line.model._changed:
            line.model._changed.notify_all()  # as time passes
        line._threads[-1].join(DEADLINE_S)
        assert str(line.results["a"]) == "busy for 10 s"
        line.ask("b", [2])
    assert line.rounds == [["first"], [2]]
    assert line.results["b"] == [4]
