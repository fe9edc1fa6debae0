"""Publishing from a learner rank, in full and as differences; what a failed publish leaves."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_cluster.errors import RlhfError, WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.weights import store
from rlhf_cluster.weights.sync import MAX_REFUSED, BasePlan, WeightSync
from tests.support.builders.small_weights import assert_same
from tests.support.builders.tiny_learner import random_groups
from tests.support.fakes.services import (
    FakeGeneration,
    FakeLearner,
    make_version,
)

DELTA = {
    "learner": {"learning_rate": 1e-6},
    "weights": {"format": "delta", "anchor_every": 3, "dtype": "bfloat16"},
}


def published_weights(learner: Any) -> dict[str, torch.Tensor]:
    """Name and value as the checkpoint has them, in the published type."""
    shapes = learner.tensor_shapes()
    return {
        name.removeprefix("lm."): p.detach().full_tensor().to(torch.bfloat16)
        for name, p in learner.policy.named_parameters()
        if name.removeprefix("lm.") in shapes
    }


def publish(learner: Any, root: Path, base: int | None) -> WeightVersion:
    report = learner.write_snapshot(str(root), base)
    shapes = learner.tensor_shapes()
    return store.commit(root, report.version, [report], keep=2, expected_names=shapes)


def test_differences_of_real_steps_are_the_snapshots_bit_for_bit(
    start_learner: Any, tmp_path: Path
) -> None:
    learner = start_learner(**DELTA)
    plan = BasePlan(3)
    sizes = []
    for step in range(5):
        assert learner.snapshot() == step
        wanted = published_weights(learner)
        version = publish(learner, tmp_path, plan.take_base())
        plan.committed(version.version)
        sizes.append(version.stored_bytes)
        assert_same(
            dict(sorted(dict(store.read(version.path)).items())), dict(sorted(wanted.items()))
        )
        learner.train_step(random_groups(step, version=step))
    chains = [len(store.open_version(tmp_path / f"v{n:06d}").chain) for n in (3, 4)]
    assert chains == [0, 1]
    assert store.versions(tmp_path) == [3, 4]
    assert max(sizes[1], sizes[2], sizes[4]) < 0.5 * min(sizes[0], sizes[3])


def test_a_rank_refuses_a_base_that_it_does_not_hold_and_can_publish_in_full(
    start_learner: Any, tmp_path: Path
) -> None:
    learner = start_learner(**DELTA)
    learner.snapshot()
    with pytest.raises(
        WeightError, match="rank 0 holds version none.*since version 7.*full snapshot"
    ):
        learner.write_snapshot(str(tmp_path), 7)
    assert publish(learner, tmp_path, None).version == 0
    learner.train_step(random_groups(0))
    learner.snapshot()
    with pytest.raises(WeightError, match="rank 0 holds version 0"):
        learner.write_snapshot(str(tmp_path), 7)
    assert publish(learner, tmp_path, 0).version == 1


class _Buffer:
    async def set_live_version(self, version: int) -> None: ...


async def no_pause(seconds: float) -> None:
    await asyncio.sleep(0)


def sync_of(learner: FakeLearner, generation: FakeGeneration) -> WeightSync:
    return WeightSync(learner, generation, _Buffer(), 1, time.monotonic, sleep=no_pause)  # type: ignore[arg-type]


@pytest.mark.parametrize("where", ["publish", "pull"])
async def test_a_publish_that_fails_once_is_made_up_for_within_the_run(where: str) -> None:
    learner, generation = FakeLearner(), FakeGeneration()
    sync = sync_of(learner, generation)
    owner = learner if where == "publish" else generation
    works, calls = getattr(owner, where), []

    async def fails_at_first(*arguments: object) -> WeightVersion:
        calls.append(arguments)
        if len(calls) < MAX_REFUSED:
            raise WeightError("no space left on device")
        return await works(*arguments)

    setattr(owner, where, fails_at_first)
    await sync.after_step(0)
    await sync.drain(5)
    assert (sync.stats.live, sync.stats.refused) == (0, MAX_REFUSED - 1)


@pytest.mark.parametrize("where", ["publish", "pull", "follow"])
async def test_a_storage_that_answers_only_errors_for_half_a_minute_ends_no_run(where: str) -> None:
    """Such errors come at once, so that the tries themselves take no time."""
    now = 0.0
    learner, generation = FakeLearner(), FakeGeneration()

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async def follow(version: WeightVersion) -> None:
        if where == "follow" and now < 30.0:
            raise WeightError("Input/output error")

    arguments = (learner, generation, _Buffer(), 1, lambda: now, follow, sleep)
    sync = WeightSync(*arguments)  # type: ignore[arg-type]
    if where != "follow":
        owner = learner if where == "publish" else generation
        works = getattr(owner, where)

        async def fails_for_a_while(*arguments: object) -> WeightVersion:
            if now < 30.0:
                raise WeightError("Input/output error")
            return await works(*arguments)

        setattr(owner, where, fails_for_a_while)
    await sync.after_step(0)
    await sync.drain(5)
    assert sync.stats.live == 0
    assert now <= 60.0


@pytest.mark.parametrize("where", ["pull", "follow"])
async def test_a_publish_that_pauses_when_its_learner_dies_is_not_waited_for(where: str) -> None:
    learner, generation, paused = FakeLearner(), FakeGeneration(), asyncio.Event()

    async def sleep(seconds: float) -> None:
        paused.set()
        await asyncio.Event().wait()

    async def fails(version: WeightVersion) -> None:
        raise WeightError("Input/output error")

    if where == "pull":
        generation.pull = fails  # type: ignore[method-assign]
    arguments = (learner, generation, _Buffer(), 1, time.monotonic, fails, sleep)
    sync = WeightSync(*arguments)  # type: ignore[arg-type]
    await sync.after_step(0)
    await paused.wait()
    await sync.abandon(5)
    assert len(asyncio.all_tasks()) == 1, "the publish has ended"


async def test_an_abandoned_publish_begins_no_pause() -> None:
    learner, generation, pulls = FakeLearner(), FakeGeneration(), asyncio.Event()
    end, paused = asyncio.Event(), []

    async def sleep(seconds: float) -> None:
        paused.append(seconds)

    async def fails_late(version: WeightVersion) -> None:
        pulls.set()
        await end.wait()
        raise WeightError("Input/output error")

    generation.pull = fails_late  # type: ignore[method-assign]
    arguments = (learner, generation, _Buffer(), 1, time.monotonic, None, sleep)
    sync = WeightSync(*arguments)  # type: ignore[arg-type]
    await sync.after_step(0)
    await pulls.wait()
    abandoned = asyncio.create_task(sync.abandon(5))
    await asyncio.sleep(0)
    end.set()
    await abandoned
    assert paused == []


@pytest.mark.parametrize("where", ["publish", "pull"])
async def test_a_failed_publish_says_why_and_the_next_one_works_without_a_restart(
    where: str,
) -> None:
    learner, generation = FakeLearner(), FakeGeneration()
    sync = sync_of(learner, generation)

    async def fails(*_: object) -> WeightVersion:
        raise WeightError("generation-1.pull: tensor 'w' is damaged")

    owner = learner if where == "publish" else generation
    works = getattr(owner, where)
    setattr(owner, where, fails)
    await sync.after_step(0)
    with pytest.raises(RlhfError, match=r"generation-1.pull: tensor 'w' is damaged"):
        await sync.drain(5)
    assert sync.stats.live == -1

    setattr(owner, where, works)
    learner.version = 1
    await sync.after_step(1)
    await sync.drain(5)
    assert sync.stats.live == generation.pulled[-1] == 1
    assert sync.last == make_version(1)


@pytest.mark.parametrize("num_refusals", [1, MAX_REFUSED - 1, MAX_REFUSED])
async def test_a_version_that_every_reader_refuses_is_replaced_by_the_newest_weights(
    num_refusals: int,
) -> None:
    learner, generation = FakeLearner(), FakeGeneration()
    sync = sync_of(learner, generation)
    asked: list[int] = []
    works = generation.pull

    async def pull(version: WeightVersion) -> None:
        asked.append(version.version)
        learner.version += 1  # the learner goes on meanwhile
        if len(asked) <= num_refusals:
            raise WeightError(f"generation-0: the objects of version {version.version} are lost")
        await works(version)

    generation.pull = pull  # type: ignore[method-assign]
    await sync.after_step(0)
    if num_refusals == MAX_REFUSED:
        with pytest.raises(WeightError, match="the objects of version 2 are lost"):
            await sync.drain(5)
        assert sync.stats.live == -1
    else:
        await sync.drain(5)
        assert sync.stats.live == num_refusals
    assert asked == list(range(min(num_refusals + 1, MAX_REFUSED)))
    assert sync.stats.refused == num_refusals
    assert learner.refusals == [
        (n, f"generation-0: the objects of version {n} are lost") for n in range(num_refusals)
    ]


async def test_a_version_is_live_after_it_was_pulled_and_never_when_it_was_refused() -> None:
    told: list[str] = []

    class Generation(FakeGeneration):
        async def pull(self, version: WeightVersion) -> None:
            told.append(f"pull {version.version}")
            if version.version == 0:
                raise WeightError("version 0 is not live: 0 of 4 generation workers took it")

    class Buffer:
        async def set_live_version(self, version: int) -> None:
            told.append(f"live {version}")

    learner = FakeLearner()
    sync = WeightSync(learner, Generation(), Buffer(), 1, time.monotonic, sleep=no_pause)  # type: ignore[arg-type]
    await sync.after_step(0)
    learner.version = 1
    await sync.drain(5)
    assert told == ["pull 0", "pull 1", "live 1"]


@pytest.mark.parametrize("num_refused", [2, 3])
async def test_d01_a_version_waits_for_a_reference_that_its_readers_refuse(
    num_refused: int,
) -> None:
    asked: list[int] = []

    async def follow(version: WeightVersion) -> None:
        asked.append(version.version)
        if len(asked) <= num_refused:
            raise WeightError("the reference of version 0 is not live: its storage is slow")

    class Buffer:
        async def set_live_version(self, version: int) -> None:
            asked.append(-1)

    learner, generation = FakeLearner(), FakeGeneration()
    sync = WeightSync(learner, generation, Buffer(), 1, time.monotonic, follow, sleep=no_pause)  # type: ignore[arg-type]
    await sync.after_step(0)
    if num_refused == MAX_REFUSED:
        with pytest.raises(WeightError, match="its storage is slow"):
            await sync.drain(5)
        assert asked == [0, 0, 0], "never live"
    else:
        await sync.drain(5)
        assert asked == [0, 0, 0, -1]
    assert generation.pulled == [0], "the readers of the version itself have it"


async def test_a_publish_that_was_due_beside_another_one_is_made_up_for_with_the_newest_weights() -> (
    None
):
    learner, generation = FakeLearner(), FakeGeneration()
    sync = sync_of(learner, generation)
    for version in range(4):  # none of them lets the one under way go on
        learner.version = version
        await sync.after_step(version)
    await sync.drain(5)
    assert (sync.stats.skipped, sync.stats.live) == (3, 3)
    assert generation.pulled == [0, 3]
