"""Groups that wait for one model share its passes, and nothing else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.errors import ScoringError
from rlhf_cluster.rewards.base import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.scoring.reference import Reference
from rlhf_cluster.scoring.together import Together
from tests import tiny_llama
from tests.rewarding import make_prompt, make_rollouts

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


class Line:
    """A model that is busy with `first` until the block ends; then those that came meanwhile."""

    def __init__(self, compute: Callable[[list[Any]], list[Any]], **settings: Any) -> None:
        self.rounds: list[list[Any]] = []
        self.clock, self.begun, self.free = Clock(), threading.Event(), threading.Event()
        self.results: dict[str, Any] = {}
        self._compute, self._threads = compute, []
        self.model: Together[Any, Any] = Together(
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


# The models


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    tiny_llama.save(tiny_llama.build(seed=1, max_position=48), folder)
    return folder


def groups() -> list[Any]:
    prompt = make_prompt(ids=[2, 3, 0, 4])
    responses = ([[9, 8, 7, 6, 1], [9]], [[5, 1]], [[0, 0, 0], [30] * 20])
    return [make_rollouts(prompt, own) for own in responses]


def asked_at_once(model: Together[Any, Any], calls: list[Callable[[], Any]]) -> list[Any]:
    """The results of all calls, which wait while somebody else is served."""
    found: list[Any] = [None] * len(calls)
    clock = model._clock = Clock()

    def call(place: int) -> None:
        found[place] = calls[place]()

    model._is_busy = True
    threads = []
    for place in range(len(calls)):
        name = f"call {place}"
        threads.append(threading.Thread(target=call, args=(place,), name=name, daemon=True))
        threads[-1].start()
        assert clock.waits(name).wait(DEADLINE_S)
    model._end_round([])
    for thread in threads:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
    return found


@pytest.mark.parametrize(("batch_groups", "rounds"), [(1, 3), (2, 2), (8, 1)])
def test_the_reference_gives_groups_together_what_it_gives_each_alone(
    model_dir, batch_groups, rounds
):
    reference = Reference(str(model_dir), "float32", "cpu", 4096, batch_groups=batch_groups)
    alone = [reference.logprobs(own) for own in groups()]
    before = reference._together.num_rounds
    calls = [lambda own=own: reference.logprobs(own) for own in groups()]
    together = asked_at_once(reference._together, calls)
    assert reference._together.num_rounds - before == rounds
    for one, other in zip(alone, together, strict=True):
        for values, expected in zip(other, one, strict=True):
            np.testing.assert_allclose(values, expected, atol=2e-5)


def test_a_reward_model_gives_groups_together_what_it_gives_each_alone(tmp_path, model_dir):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path / "reward_model"
    settings = LlamaConfig.from_pretrained(model_dir, num_labels=1, pad_token_id=tiny_llama.END)
    torch.manual_seed(2)
    LlamaForSequenceClassification(settings).save_pretrained(folder)
    config = RewardModelConfig(path=str(folder), dtype="float32")
    context = RewardContext(tokenizer_dir=str(model_dir), batch_groups=4)
    reward = RewardModel(config, context)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    alone = [reward.score(prompt, own, [""] * len(own)) for own in groups()]
    before = reward._together.num_rounds
    calls = [lambda own=own: reward.score(prompt, own, [""] * len(own)) for own in groups()]
    together = asked_at_once(reward._together, calls)
    assert reward._together.num_rounds == before + 1
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=2e-5)
