import asyncio
import time
from dataclasses import dataclass, field

import pytest

from rlhf_cluster.algorithms import DapoConfig, GrpoConfig
from rlhf_cluster.buffer.adaptive_depth import DepthController
from rlhf_cluster.buffer.buffer import ExperienceBuffer
from rlhf_cluster.buffer.buffer_service import BufferService
from rlhf_cluster.buffer.staleness import AdmissionGate
from rlhf_cluster.errors import (
    DataError,
    PoolLost,
    RecordError,
    RecordLost,
    RlhfError,
    ScoringError,
    StalenessError,
    StalledError,
    StoreError,
    WorkerError,
)
from rlhf_cluster.evaluation.evaluate import evaluate
from rlhf_cluster.pipeline import (
    MAX_REGENERATIONS,
    NO_SIGNAL,
    Pipeline,
)
from rlhf_cluster.records import Sampling, Ticket
from rlhf_cluster.sections.rl_run import AdaptiveDepth
from rlhf_cluster.weights.sync import WeightSync
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
    FakeObserver,
    FakePrompts,
    FakeScoring,
    make_group,
    make_prompt,
    make_version,
)

GREEDY = Sampling(num_samples=1, temperature=0.0, max_tokens=8)


async def build(steps=6, groups=3, max_staleness=1, depth=1, publish_every=1, **parts):
    generation = parts.get("generation", FakeGeneration())
    learner = parts.get("learner", FakeLearner())
    gate = AdmissionGate(
        max_staleness=max_staleness,
        pipeline_depth=depth,
        groups_per_step=groups,
        num_steps=steps,
        **parts.get("gate", {}),
    )
    stall_s = parts.get("stall_timeout_s", 30.0)
    buffer = BufferService(ExperienceBuffer(gate), stall_s, 0.05, time.monotonic)
    sync = WeightSync(learner, generation, buffer, publish_every, time.monotonic)
    await sync.after_step(0)
    await sync.drain(5)
    return Pipeline(
        generation=generation,
        scoring=parts.get("scoring", FakeScoring()),
        buffer=buffer,
        learner=learner,
        sync=sync,
        prompts=FakePrompts(),
        observer=FakeObserver(),
        sampling=Sampling(num_samples=2, temperature=1.0, max_tokens=8),
        num_steps=steps,
        groups_per_step=groups,
        max_error_rate=0.5,
        live_timeout_s=5,
        depth=parts.get("controller"),
        trains_on=parts.get("trains_on", lambda rewards: True),
    )


async def test_every_step_trains_whole_batches_in_admission_order():
    pipeline = await build()
    await pipeline.run()
    numbers = [int(group_id[1:]) for _, group_id, _ in pipeline.learner.trained]
    assert numbers == list(range(18))
    assert [report.step for report in pipeline.observer.steps] == [1, 2, 3, 4, 5, 6]
    assert pipeline.generation.pulled[-1] == 6, "the last weights are live when the run ends"


async def test_every_ticket_gets_the_prompt_of_its_number():
    pipeline = await build()
    pipeline.first_prompt = 100
    produced: list[tuple[int, str]] = []
    generate = pipeline.generation.generate

    async def watched(ticket, prompt, sampling):
        produced.append((ticket.number, prompt.prompt_id))
        return await generate(ticket, prompt, sampling)

    pipeline.generation.generate = watched
    await pipeline.run()
    assert sorted(produced) == [(n, f"p{100 + n}") for n in range(18)]


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
async def test_trained_staleness_stays_within_the_bound_with_slow_groups(max_staleness):
    generation = FakeGeneration(delay=lambda t: 0.02 if t.number % 4 == 0 else 0.0)
    learner = FakeLearner(publish_delay_s=0.01)
    pipeline = await build(
        steps=10, max_staleness=max_staleness, depth=3, generation=generation, learner=learner
    )
    await pipeline.run()
    ages = [age for _, _, age in learner.trained]
    assert len(ages) == 30
    assert min(ages) >= 0
    assert max(ages) <= max_staleness
    if max_staleness == 0:
        assert set(ages) == {0}


async def test_asynchronous_training_overlaps_generation_with_the_step():
    busy: list[bool] = []
    learner = FakeLearner(step_delay_s=0.02)
    generation = FakeGeneration(delay=lambda t: 0.01)

    class Watching(FakeGeneration):
        async def generate(self, ticket, prompt, sampling):
            busy.append(learner.version < ticket.number // 3)
            return await generation.generate(ticket, prompt, sampling)

        async def pull(self, version):
            await generation.pull(version)

    pipeline = await build(generation=Watching(), learner=learner)
    await pipeline.run()
    assert any(busy), "some group was started before the learner had finished the step before"


class Stored:
    """A recovery that has the first group on disk, with tokens of version 0."""

    attempt = 0

    def recover(self, ticket, prompt):
        group = make_group(ticket, prompt, [0.0, 1.0], version=0)
        return (group, group.summary()) if ticket.number == 0 else None

    def record_trained(self, step, numbers):
        pass


@pytest.mark.parametrize("in_time", [True, False])
async def test_d10_a_stored_group_whose_turn_comes_too_late_is_generated_again(in_time):
    pipeline = await build()
    pipeline.recovery, asked = Stored(), []

    def trainable(ticket, oldest_version):
        asked.append((ticket.number, oldest_version))
        return in_time

    pipeline.trainable = trainable
    await pipeline.run()
    assert asked == [(0, 0)]
    assert pipeline.observer.recovered == [0] * in_time
    assert (0 in [t.number for t in pipeline.generation.requested]) is not in_time


async def test_a_failed_group_is_discarded_counted_and_replaced():
    generation = FakeGeneration(
        fail=lambda t: WorkerError("out of luck") if t.number == 4 else None
    )
    pipeline = await build(generation=generation)
    await pipeline.run()
    assert pipeline.observer.discarded == [("g00000004", "out of luck")]
    assert len(pipeline.learner.trained) == 18
    assert pipeline.buffer.buffer.stats().discarded == {"WorkerError": 1}


@pytest.mark.parametrize(
    "error", [RecordError("a log-probability is nan"), DataError("the engine refuses it")]
)
@pytest.mark.parametrize("where", ["generation", "scoring"])
async def test_d05_a_bad_sample_is_a_discard_with_its_reason(error, where):
    if where == "generation":
        part = FakeGeneration(fail=lambda t: error if t.number == 4 else None)
    else:
        part = FakeScoring(fail=lambda g: error if g.ticket.number == 4 else None)
    pipeline = await build(**{where: part})
    await pipeline.run()
    assert pipeline.observer.discarded == [("g00000004", str(error))]
    assert pipeline.buffer.buffer.stats().discarded == {type(error).__name__: 1}


@pytest.mark.parametrize("error", [StoreError("disk full"), StalenessError("over the bound")])
async def test_d05_what_no_other_group_can_be_spared_ends_the_run(error):
    pipeline = await build(scoring=FakeScoring(fail=lambda g: error))
    with pytest.raises(type(error), match=str(error)):
        await pipeline.run()
    assert pipeline.observer.discarded == []


@dataclass
class LosingScoring(FakeScoring):
    """The first `losses` times that a group comes, its record is gone with the node that held it."""

    losses: int = 1
    asked: dict[int, int] = field(default_factory=dict)

    async def score(self, group):
        number = group.ticket.number
        self.asked[number] = self.asked.get(number, 0) + 1
        if self.asked[number] <= self.losses:
            raise RecordLost(f"score({group.ticket.group_id}): lost with its node")
        return await super().score(group)


async def test_groups_that_a_node_takes_before_they_are_scored_are_generated_again():
    pipeline = await build(scoring=LosingScoring(losses=MAX_REGENERATIONS))
    await pipeline.run()
    assert pipeline.observer.discarded == []
    numbers = [ticket.number for ticket in pipeline.generation.requested]
    assert sorted(numbers) == [n for n in range(18) for _ in range(1 + MAX_REGENERATIONS)]
    prompts = [make_prompt(0)]
    found = await evaluate(FakeGeneration(version=2), LosingScoring(), prompts, GREEDY, 2)
    assert len(found.answers) == 1


async def test_a_group_that_is_always_lost_is_a_discard_with_its_reason():
    pipeline = await build(scoring=LosingScoring(losses=MAX_REGENERATIONS + 1), groups=8)
    with pytest.raises(RecordLost, match="lost with its node"):
        await pipeline.run()
    assert pipeline.buffer.buffer.stats().discarded.keys() == {"RecordLost"}


async def test_without_a_pool_the_run_ends_at_once_with_its_reason():
    lost = PoolLost("generation: 2 restarts, more than 1. First cause: a broken disk")
    pipeline = await build(generation=FakeGeneration(fail=lambda t: lost))
    with pytest.raises(PoolLost, match="a broken disk"):
        await pipeline.run()
    assert pipeline.observer.discarded == []


@pytest.mark.parametrize("kind", [ScoringError, RecordError, DataError])
async def test_d05_too_many_failures_end_the_run_with_their_reason(kind: type[RlhfError]):
    scoring = FakeScoring(fail=lambda g: kind("reward 'mine' returned None"))
    pipeline = await build(scoring=scoring, groups=8)
    with pytest.raises(kind, match="max_error_rate = 0.5.*returned None"):
        await pipeline.run()


async def test_a_learner_failure_ends_every_loop_and_is_what_the_caller_sees():
    pipeline = await build(learner=FakeLearner(fail_at=2))
    with pytest.raises(RlhfError, match="the learner broke"):
        await pipeline.run()
    assert len(asyncio.all_tasks()) == 1, "no loop was left behind"


async def test_dead_generation_ends_the_run_within_the_stall_deadline():
    generation = FakeGeneration(delay=lambda t: 3600.0 if t.number >= 6 else 0.0)
    pipeline = await build(generation=generation, stall_timeout_s=0.3)
    with pytest.raises(StalledError, match="g0000000[6-9]"):
        await pipeline.run()


async def test_a_failed_publish_ends_the_run():
    learner = FakeLearner(step_delay_s=0.01)
    pipeline = await build(learner=learner, max_staleness=5, depth=5)

    async def torn():
        raise RlhfError("disk full")

    learner.publish = torn
    with pytest.raises(RlhfError, match="disk full"):
        await pipeline.run()


async def test_publishing_less_often_still_ends_within_the_bound():
    pipeline = await build(steps=9, max_staleness=2, depth=2, publish_every=3)
    await pipeline.run()
    assert pipeline.generation.pulled == [0, 3, 6, 9]
    assert max(age for _, _, age in pipeline.learner.trained) <= 2


async def test_a_slow_publish_is_skipped_counted_and_the_newest_version_still_gets_live():
    learner = FakeLearner(publish_delay_s=0.05)
    pipeline = await build(steps=8, max_staleness=8, depth=8, learner=learner)
    await pipeline.run()
    assert pipeline.sync.stats.skipped > 0
    assert pipeline.generation.pulled[-1] == 8


async def test_evaluation_refuses_answers_of_another_version():
    generation = FakeGeneration()
    await generation.pull(make_version(2))
    prompts = [make_prompt(i) for i in range(3)]
    found = await evaluate(generation, FakeScoring(), prompts, GREEDY, version=2)
    assert [s.rewards for s in found.answers] == [(1.0,)] * 3
    assert found.failures == []
    assert all(isinstance(t, Ticket) and t.purpose == "evaluate" for t in generation.requested)
    with pytest.raises(WorkerError, match="sampled with version 2"):
        await evaluate(generation, FakeScoring(), prompts, GREEDY, version=3)


@pytest.mark.parametrize("failing", [{1}, {0, 1, 2}])
async def test_d11_a_prompt_that_fails_costs_an_evaluation_itself_only(failing):
    generation = FakeGeneration(
        version=2, fail=lambda t: DataError("too long") if t.number in failing else None
    )
    prompts = [make_prompt(i) for i in range(3)]
    found = await evaluate(generation, FakeScoring(), prompts, GREEDY, version=2)
    assert [str(error) for error in found.failures] == ["too long"] * len(failing)
    assert len(found.answers) == 3 - len(failing)
    generation.fail = lambda t: PoolLost("generation: nobody left")
    with pytest.raises(PoolLost):
        await evaluate(generation, FakeScoring(), prompts, GREEDY, version=2)


@dataclass
class LateLearner(FakeLearner):
    """Publishing takes until one more step is done."""

    num_steps: int = 12
    stepped: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def reach(self, version):
        async with asyncio.timeout(30), self.stepped:
            await self.stepped.wait_for(lambda: self.version >= version)

    async def train_step(self, groups):
        report = await super().train_step(groups)
        async with self.stepped:
            self.stepped.notify_all()
        return report

    async def publish(self):
        version = self.snapshot_version
        if version > 0:
            await self.reach(min(version + 1, self.num_steps))
        return make_version(version)


async def test_a_window_trains_around_a_slow_group_within_the_bound():
    """G = 3 and W = 2: group 3 is taken before group 2, and nothing else before both."""

    class Holding(FakeGeneration):
        async def generate(self, ticket, prompt, sampling):
            if ticket.number == 2:
                await learner.reach(1)
            return await super().generate(ticket, prompt, sampling)

    learner = LateLearner(num_steps=4)
    rules = {"look_ahead": 2}
    pipeline = await build(
        steps=4, max_staleness=2, depth=2, generation=Holding(), learner=learner, gate=rules
    )
    await pipeline.run()
    numbers = [int(group_id[1:]) for _, group_id, _ in learner.trained]
    assert numbers == [0, 1, 3, 2, *range(4, 12)]
    assert max(age for _, _, age in learner.trained) <= 2


async def test_reweight_trains_what_a_slow_publish_made_too_old():
    rules = {"on_stale": "reweight", "stale_limit": 3}
    pipeline = await build(steps=12, learner=LateLearner(), gate=rules)
    await pipeline.run()
    ages = [age for _, _, age in pipeline.learner.trained]
    assert 1 < max(ages) <= 3
    stats = pipeline.buffer.buffer.stats()
    assert stats.reweighted == sum(age > 1 for age in ages)
    assert stats.num_discarded == 0


async def test_drop_replaces_what_a_slow_publish_made_too_old():
    pipeline = await build(steps=12, learner=LateLearner(), gate={"on_stale": "drop"})
    await pipeline.run()
    ages = [age for _, _, age in pipeline.learner.trained]
    assert len(ages) == 36
    assert max(ages) <= 1
    assert pipeline.buffer.buffer.stats().discarded["stale"] > 0


async def test_an_adaptive_depth_reaches_the_buffer_and_is_told_with_its_reason():
    thresholds = AdaptiveDepth(ess_low=0.5, ess_high=0.8, wait_share=0.1, steps=2)
    controller = DepthController(depth=1, max_staleness=2, thresholds=thresholds)
    learner = FakeLearner(metrics={"importance/effective_sample_size": 0.3})
    pipeline = await build(steps=8, max_staleness=2, learner=learner, controller=controller)
    await pipeline.run()
    assert pipeline.buffer.buffer.gate.pipeline_depth == 0
    assert pipeline.observer.events == [
        "pipeline depth 1 -> 0: effective sample size 0.30 is under 0.5"
    ]
    depths = [report.metrics["staleness/pipeline_depth"] for report in pipeline.observer.steps]
    assert depths == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


async def test_groups_that_the_algorithm_does_not_train_on_are_replaced_and_are_no_failures():
    scoring = FakeScoring(rewards=lambda group: [1.0, float(group.ticket.number % 2 == 0)])
    dapo = DapoConfig(dynamic_sampling=True)
    pipeline = await build(steps=4, scoring=scoring, trains_on=dapo.trains_on)
    await pipeline.run()
    numbers = [int(group_id[1:]) for _, group_id, _ in pipeline.learner.trained]
    assert numbers == list(range(1, 24, 2)), "whole batches of groups with a signal, in order"
    assert pipeline.buffer.buffer.stats().discarded[NO_SIGNAL] >= 11
    assert pipeline.observer.discarded == []
    assert max(age for _, _, age in pipeline.learner.trained) <= 1


def test_dynamic_sampling_is_a_switch_and_looks_at_the_spread():
    assert DapoConfig().trains_on([1.0, 1.0])
    assert not DapoConfig(dynamic_sampling=True).trains_on([0.3, 0.3 + 1e-9])
    assert DapoConfig(dynamic_sampling=True).trains_on([0.0, 1.0])
    assert GrpoConfig().trains_on([1.0, 1.0])


@dataclass
class ManyStored:
    """A recovery of which every ticket's group is there, and group 7 cannot be replayed."""

    attempt: int = 1
    at_once: int = 0
    most: int = 0
    looks: list[int] = field(default_factory=list)

    def recover(self, ticket, prompt):
        return None

    def find_unusable(self, numbers):
        self.looks.append(len(numbers))
        return [number for number in numbers if number == 7]

    def record_trained(self, step, numbers):
        return None


async def test_thousands_of_stored_groups_are_read_a_few_at_once():
    pipeline = await build(steps=1, groups=400)
    stored = pipeline.recovery = ManyStored()
    pipeline.replayable = range(100)

    async def on_disk(call, *arguments):
        stored.at_once += 1
        stored.most = max(stored.most, stored.at_once)
        await asyncio.sleep(0)
        found = call(*arguments)
        stored.at_once -= 1
        return found

    excluded: list[int] = []

    async def exclude(numbers):
        excluded.extend(numbers)

    pipeline.on_disk, pipeline.buffer.exclude_from_replay = on_disk, exclude
    await pipeline.run()
    assert 16 < stored.most <= 32 + 1, "the step's note is written beside the reads"
    assert stored.looks == [32, 32, 32, 4]
    assert excluded == [7]
