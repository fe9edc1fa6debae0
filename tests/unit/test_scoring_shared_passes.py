"""Groups that wait for one model share its passes, and nothing else."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest

from rlhf_cluster.errors import ScoringError, StalledError
from rlhf_cluster.rewards.base import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.scoring.reference import Reference
from rlhf_cluster.scoring.scorer import Scorer
from rlhf_cluster.scoring.shared_passes import SharedPasses
from tests import tiny_llama
from tests.configs import tiny_config
from tests.rewarding import make_group, make_prompt, make_rollouts

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


def asked_at_once(model: SharedPasses[Any, Any], calls: list[Callable[[], Any]]) -> list[Any]:
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


def passes_of(model: Any) -> list[int]:
    """The rows of every forward pass of `model` from now on."""
    rows: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        rows.append(len(args[0] if args else kwargs["input_ids"]))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return rows


@pytest.mark.parametrize(
    ("batch_groups", "passes"), [(1, [2, 1, 2]), (2, [3, 2]), (8, [5])], ids=["1", "2", "8"]
)
def test_the_reference_gives_groups_together_what_it_gives_each_alone(
    model_dir, batch_groups, passes
):
    """Alone each group is a pass; then those that wait share them."""
    reference = Reference(str(model_dir), "float32", "cpu", 4096, batch_groups=batch_groups)
    rows = passes_of(reference._model._policy)
    alone = [reference.logprobs(own) for own in groups()]
    assert rows == [2, 1, 2]
    calls = [lambda own=own: reference.logprobs(own) for own in groups()]
    together = asked_at_once(reference._together, calls)
    assert rows[3:] == passes
    for one, other in zip(alone, together, strict=True):
        for values, expected in zip(other, one, strict=True):
            np.testing.assert_allclose(values, expected, atol=2e-5)
            if batch_groups == 1:
                assert np.array_equal(values, expected)


def test_a_rollout_that_cannot_be_scored_fails_its_group_before_it_joins(model_dir):
    reference = Reference(str(model_dir), "float32", "cpu", 64, batch_groups=8)
    rows = passes_of(reference._model._policy)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    with pytest.raises(ScoringError, match="temperature 0"):
        reference.logprobs(make_rollouts(prompt, [[5]], temperature=0.0))
    with pytest.raises(ScoringError, match="has 73 positions"):
        reference.logprobs(make_rollouts(prompt, [[5], [5] * 70]))
    assert (reference._together.num_calls, rows) == (0, [])


class WatchedLock:
    """A lock that tells when somebody waits for it."""

    def __init__(self) -> None:
        self._lock, self.waited_for = threading.Lock(), threading.Event()

    def acquire(self, timeout: float) -> bool:
        if self._lock.acquire(blocking=False):
            return True
        self.waited_for.set()
        return self._lock.acquire(timeout=timeout)

    def release(self) -> None:
        self._lock.release()


def test_groups_that_share_passes_are_scored_with_one_reference_while_it_is_replaced(
    model_dir, tmp_path
):
    """Two temperatures are two passes: the other reference comes in the first one, and waits."""
    other = tiny_llama.build(seed=2, max_position=48)
    version = tiny_llama.publish(tmp_path, 3, tiny_llama.checkpoint_tensors(other))
    reference = Reference(str(model_dir), "float32", "cpu", 4096, batch_groups=8)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    asked = [make_rollouts(prompt, [[9, 8, 7]], temperature=t) for t in (0.7, 1.0)]
    before = [reference.logprobs(own)[0] for own in asked]
    lock = WatchedLock()
    reference._model._lock = lock  # type: ignore[assignment]
    loading = threading.Thread(target=reference.load, args=(version,), daemon=True)

    def replaced_meanwhile(module: Any, args: Any) -> None:
        if loading.ident is None:
            loading.start()
            assert lock.waited_for.wait(DEADLINE_S)

    reference._model._policy.register_forward_pre_hook(replaced_meanwhile)
    rows = passes_of(reference._model._policy)
    calls = [lambda own=own: reference.logprobs(own) for own in asked]
    together = asked_at_once(reference._together, calls)
    assert rows == [1, 1]
    assert reference._together.num_rounds == 3  # two alone, and these
    loading.join(DEADLINE_S)
    assert not loading.is_alive()
    for [found], old, own in zip(together, before, asked, strict=True):
        np.testing.assert_array_equal(found, old)
        assert not np.allclose(reference.logprobs(own)[0], old)


@pytest.fixture(scope="module")
def reward_dir(model_dir, tmp_path_factory):
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    settings = LlamaConfig.from_pretrained(model_dir, num_labels=1, pad_token_id=tiny_llama.END)
    torch.manual_seed(2)
    LlamaForSequenceClassification(settings).save_pretrained(folder)
    return folder


def test_a_reward_model_gives_groups_together_what_it_gives_each_alone(reward_dir, model_dir):
    config = RewardModelConfig(path=str(reward_dir), dtype="float32")
    context = RewardContext(tokenizer_dir=str(model_dir), batch_groups=4)
    reward = RewardModel(config, context)
    prompt = make_prompt(ids=[2, 3, 0, 4])
    alone = [reward.score(prompt, own, [""] * len(own)) for own in groups()]
    rows = passes_of(reward._model.base_model)
    calls = [lambda own=own: reward.score(prompt, own, [""] * len(own)) for own in groups()]
    together = asked_at_once(reward._together, calls)
    assert rows == [5]
    for one, other in zip(alone, together, strict=True):
        assert other == pytest.approx(one, abs=2e-5)


@pytest.mark.parametrize(("batch_groups", "passes"), [(1, [2, 1, 2]), (2, [3, 2])], ids=["1", "2"])
def test_a_scorers_reference_teacher_and_reward_model_follow_the_setting(
    model_dir, reward_dir, batch_groups, passes
):
    reward = {"type": "reward_model", "path": str(reward_dir), "dtype": "float32"}
    config = tiny_config(
        algorithm={"type": "on_policy_distillation"},
        scoring={
            "rewards": [reward],
            "reference": True,
            "teacher": str(model_dir),
            "batch_groups": batch_groups,
        },
    )
    scorer = Scorer(config, str(model_dir), "scoring-0")
    scorer.setup()
    prompt = make_prompt(ids=[2, 3, 0, 4])
    given = [make_group(prompt, own) for own in groups()]
    reference, teacher = cast("Any", scorer._reference), cast("Any", scorer._teacher)
    rewards = cast("Any", scorer._rewards._built["reward_model"])
    fronts = {
        reference._together: passes_of(reference._model._policy),
        teacher._together: passes_of(teacher._model._policy),
        rewards._together: passes_of(rewards._model.base_model),
    }
    asks = [
        lambda own: reference.logprobs(own.rollouts),
        lambda own: teacher.logprobs(own.rollouts),
        lambda own: rewards.score(prompt, own.rollouts, [""] * len(own.rollouts)),
    ]
    for (front, rows), ask in zip(fronts.items(), asks, strict=True):
        asked_at_once(front, [lambda ask=ask, own=own: ask(own) for own in given])
        assert rows == passes
    scorer.close()
