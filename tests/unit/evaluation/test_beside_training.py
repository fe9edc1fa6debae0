"""Evaluations beside training, with a pool and a record that are fakes."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from rlhf_cluster.errors import PoolLost, WorkerError
from rlhf_cluster.evaluation.beside_training import BesideTraining
from rlhf_cluster.evaluation.evaluate import Evaluation, evaluate, point_metrics, reward_of
from rlhf_cluster.records import GroupSummary, Sampling, Ticket
from rlhf_cluster.weights.sync import WeightSync
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
    FakeScoring,
    make_group,
    make_prompt,
)

GREEDY = Sampling(num_samples=1, temperature=0.0, max_tokens=8)
NOTHING = Evaluation(answers=[], failures=[])


@dataclass
class Record:
    covered: dict[str, int] = field(default_factory=dict)
    points: list[tuple[str, int]] = field(default_factory=list)
    skips: list[tuple[str, int, str]] = field(default_factory=list)

    def record_point(self, name: str, version: int, found: Evaluation) -> None:
        self.points.append((name, version))
        self.covered[name] = version

    def record_skip(self, name: str, version: int, reason: str) -> None:
        self.skips.append((name, version, reason))
        self.covered[name] = version


class Measured:
    """Evaluations that end when they are let go. `started` has those that began."""

    def __init__(self) -> None:
        self.started: list[tuple[str, int]] = []
        self.let_go = asyncio.Event()
        self.num_running = self.most_running = 0

    async def __call__(self, name: str, version: int) -> Evaluation:
        self.started.append((name, version))
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await self.let_go.wait()
        finally:
            self.num_running -= 1
        return NOTHING


def beside(record: Record, measure: Any, every: dict[str, int], **settings: Any) -> BesideTraining:
    given = {"last_version": 100, "hold_s": 60.0, **settings}
    return BesideTraining(every=every, measure=measure, record=record, **given)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1000):  # turns of the event loop, and no time
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("it never came to that")


async def test_the_workers_keep_a_version_until_its_evaluation_has_ended() -> None:
    record, measure = Record(), Measured()
    runner = beside(record, measure, {"a": 2, "b": 2})
    runner.live(2)
    way = asyncio.create_task(runner.make_way(3))
    await until(lambda: measure.started == [("a", 2)])
    assert not way.done()
    measure.let_go.set()
    await way
    assert record.points == [("a", 2), ("b", 2)]
    assert record.skips == []
    assert measure.most_running == 1, "one after the other"


async def test_an_evaluation_that_is_too_slow_is_given_up_with_its_reason() -> None:
    record, measure = Record(), Measured()
    runner = beside(record, measure, {"a": 2, "b": 2}, hold_s=0.0)
    runner.live(2)
    await until(lambda: measure.started)
    await runner.make_way(3)
    assert record.points == []
    assert [(name, version) for name, version, _ in record.skips] == [("a", 2), ("b", 2)]
    assert "evaluation.hold_s = 0 s" in record.skips[0][2]
    assert measure.num_running == 0, "it has given up its calls"
    measure.let_go.set()
    runner.live(4)
    await until(lambda: len(record.points) == 2)
    assert record.points == [("a", 4), ("b", 4)], "the next one is as if nothing had been"


async def test_only_one_runs_at_a_time_and_the_next_is_skipped_and_counted() -> None:
    record, measure = Record(), Measured()
    runner = beside(record, measure, {"a": 2})
    runner.live(2)
    await until(lambda: measure.started)
    record.covered["a"] = 2
    runner.live(4)
    assert record.skips == [("a", 4, "the evaluation of version 2 still runs")]
    measure.let_go.set()
    await runner.make_way(5)
    assert record.points == [("a", 2)]
    assert measure.most_running == 1


async def test_what_the_end_of_an_attempt_cuts_short_is_due_again() -> None:
    record, measure = Record(), Measured()
    runner = beside(record, measure, {"a": 2}, hold_s=0.0)
    runner.live(2)
    await until(lambda: measure.started)
    await runner.close()
    assert (record.points, record.skips, measure.num_running) == ([], [], 0)
    again = Measured()
    again.let_go.set()
    resumed = beside(record, again, {"a": 2})
    resumed.live(3)
    await resumed.make_way(4)
    assert record.points == [("a", 3)]
    resumed.live(3)
    assert again.started == [("a", 3)], "a point that is there is not measured again"


async def test_a_version_that_goes_live_after_the_end_of_its_attempt_is_not_evaluated() -> None:
    record, measure = Record(), Measured()
    measure.let_go.set()
    runner = beside(record, measure, {"a": 2})
    await runner.close()
    runner.live(2)
    await runner.make_way(3)
    assert (measure.started, record.points) == ([], [])


async def test_a_publish_that_waits_for_an_evaluation_goes_on_when_its_attempt_ends() -> None:
    record, measure = Record(), Measured()
    runner = beside(record, measure, {"a": 2})
    runner.live(2)
    await until(lambda: measure.started)
    way = asyncio.create_task(runner.make_way(3))
    await asyncio.sleep(0)
    await runner.close()
    async with asyncio.timeout(10):
        await way
    assert (record.points, record.skips) == ([], [])


@pytest.mark.parametrize("error", [PoolLost("nobody is left"), WorkerError("other weights")])
async def test_a_failure_is_the_reason_of_a_skip_and_not_the_end_of_training(error) -> None:
    async def fails(name: str, version: int) -> Evaluation:
        raise error

    record = Record()
    runner = beside(record, fails, {"a": 2})
    runner.live(2)
    await runner.make_way(3)
    assert record.skips == [("a", 2, str(error))]


async def test_a_fault_of_the_program_is_raised() -> None:
    async def fails(name: str, version: int) -> Evaluation:
        raise KeyError(name)

    runner = beside(Record(), fails, {"a": 2})
    runner.live(2)
    with pytest.raises(KeyError):
        await runner.make_way(3)


async def test_the_learner_waits_for_no_evaluation_and_every_point_is_of_its_version() -> None:
    """The workers of `FakeGeneration` are held at version 2; the learner goes on to version 5."""
    record, asked, let_go = Record(), list[Ticket](), asyncio.Event()

    class Held(FakeGeneration):
        async def generate(self, ticket: Ticket, *rest: Any) -> Any:
            asked.append(ticket)
            await let_go.wait()
            return await super().generate(ticket, *rest)

    generation, learner = Held(), FakeLearner()

    async def measure(name: str, version: int) -> Evaluation:
        prompts = [make_prompt(i) for i in range(5)]
        return await evaluate(generation, FakeScoring(), prompts, GREEDY, version, at_once=2)

    class Buffer:
        async def set_live_version(self, version: int) -> None: ...

    runner = beside(record, measure, {"a": 2})
    sync = WeightSync(
        learner,
        generation,
        Buffer(),  # type: ignore[arg-type]
        1,
        lambda: 0.0,
        make_way=runner.make_way,
        went_live=runner.live,
    )
    for version in range(6):
        learner.version = version
        await sync.after_step(version)
        if version <= 2:
            await sync.drain(30.0)
    await until(lambda: len(asked) == 2)
    assert (sync.stats.live, sync.stats.skipped) == (2, 2), "the learner is at 5, the workers at 2"
    assert record.points == []
    let_go.set()
    await sync.drain(30.0)
    await runner.make_way(6)
    assert record.points == [("a", 2), ("a", 5)]
    assert record.skips == []
    assert {ticket.version for ticket in asked} == {2, 5}
    assert sync.stats.live == 5


async def test_an_answer_with_a_token_of_a_later_version_is_refused() -> None:
    class Mixed(FakeScoring):
        async def score(self, group: Any) -> tuple[Any, GroupSummary]:
            handle, summary = await super().score(group)
            return handle, replace(summary, newest_version=3)

    with pytest.raises(WorkerError, match="sampled with version 3"):
        await evaluate(FakeGeneration(version=2), Mixed(), [make_prompt()], GREEDY, 2)


async def test_no_more_prompts_are_in_flight_than_allowed() -> None:
    running = most = 0

    class Counting(FakeGeneration):
        async def generate(self, *arguments: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            try:
                return await super().generate(*arguments)
            finally:
                running -= 1

    prompts = [make_prompt(i) for i in range(9)]
    found = await evaluate(Counting(version=2), FakeScoring(), prompts, GREEDY, 2, at_once=3)
    assert len(found.answers) == 9
    assert most == 3


def summary(*rewards: float, **parts: float) -> GroupSummary:
    ticket = Ticket(number=0, version=2, purpose="evaluate")
    return replace(make_group(ticket, make_prompt(), rewards, version=2).summary(), parts=parts)


def test_the_numbers_of_a_point_are_over_prompts() -> None:
    found = Evaluation(answers=[summary(1.0, 0.0), summary(1.0, 1.0)], failures=[PoolLost("x")])
    assert point_metrics("a", found, {}, version=2, lag_steps=3) == {
        "evaluation/set_answers/a": 4.0,
        "evaluation/set_failed_prompts/a": 1.0,
        "evaluation/set_version/a": 2.0,
        "evaluation/set_lag_steps/a": 3.0,
        "evaluation/set_reward_mean/a": 0.75,
        "evaluation/set_reward_error/a": pytest.approx(0.25),  # std of (0.5, 1.0) / sqrt(2)
        "evaluation/set_length_mean_tokens/a": 3.5,
    }


def test_named_rewards_are_weighted_and_one_that_is_missing_gives_no_reward() -> None:
    answer = summary(1.0, length=4.0, match=0.5)
    assert reward_of(answer, {}) == 1.0
    assert reward_of(answer, {"match": 2.0, "length": -0.25}) == 0.0
    assert reward_of(answer, {"judge": 1.0}) is None
    found = Evaluation(answers=[answer], failures=[])
    values = point_metrics("a", found, {"judge": 1.0}, version=2, lag_steps=0)
    assert values["evaluation/set_failed_prompts/a"] == 1.0
    assert "evaluation/set_reward_mean/a" not in values
