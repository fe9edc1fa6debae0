"""How a pool is brought to a version of weights: the policy's, and the reference's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.run.pool_version import MAX_CATCH_UP
from tests.support.builders.small_weights import (
    publish,
    small_model,
)
from tests.support.fakes.services import make_version
from tests.support.fakes.weight_pullers import (
    SLOW,
    Moving,
    Puller,
    Pulling,
    Reference,
)

Pools = Callable[..., Pulling]


@pytest.fixture(params=["policy", "reference"])
def pools(request: pytest.FixtureRequest, tmp_path: Path) -> Pools:
    if request.param == "policy":
        return Pulling
    return lambda *pullers, **limits: Moving(tmp_path, *pullers, **limits)


BOTH = pytest.mark.parametrize(
    ("pools", "why"),
    [("policy", SLOW), ("policy", "never"), ("reference", SLOW)],
    indirect=["pools"],
)


@pytest.mark.parametrize("size", [1, 4, 16])
@BOTH
async def test_d01_a_slow_storage_kills_no_worker_and_makes_no_version_live(
    pools: Pools, size: int, why: Exception | str
) -> None:
    pulling = pools(*(Puller(why) for _ in range(size)))
    await pulling.start()
    with pytest.raises(WeightError, match=f"version 1 is not live: 0 of {size} .* workers took it"):
        await pulling.bring(1)
    assert pulling.states() == ["live"] * size, "all go on with the weights that they have"
    assert pulling.ended == []
    assert pulling.pool.restarts.total == 0
    assert all(puller.pulled == [1, 1] for puller in pulling.pullers), "asked twice, in full"
    await pulling.pool.resize(size + 1)
    assert pulling.pool.workers[-1].actor.pulled == [], "who joins does not wait for it either"


@pytest.mark.parametrize("pools", ["policy", "reference"], indirect=True)
@pytest.mark.parametrize(("num_fine", "is_live"), [(1, False), (2, True)])
async def test_a_version_is_live_where_a_quorum_of_workers_took_it_and_not_before(
    pools: Pools, num_fine: int, is_live: bool
) -> None:
    slow = [Puller(SLOW, SLOW, "fine") for _ in range(4 - num_fine)]
    pulling = pools(*(Puller("fine") for _ in range(num_fine)), *slow, min_workers=2)
    await pulling.start()
    if is_live:
        await pulling.bring(1)
        assert pulling.states()[:2] == ["live", "live"]
    else:
        with pytest.raises(WeightError, match="1 of 4 .* workers took it, 2 are needed"):
            await pulling.bring(1)


@BOTH
async def test_d01_a_worker_that_is_slow_twice_gets_no_work_until_it_has_caught_up(
    pools: Pools, why: Exception | str
) -> None:
    slow = Puller(why, why, why, "fine")
    pulling = pools(*(Puller("fine") for _ in range(3)), slow)
    await pulling.start()
    await pulling.bring(1)
    assert pulling.states() == ["live", "live", "live", "behind"]
    assert all(puller.versions == [1] for puller in pulling.pullers[:3])
    async with pulling.pool.acquire(prefer=pulling.pool.workers[3]) as worker:
        assert worker.actor is not slow
    while pulling.pool._tasks:
        await asyncio.wait(pulling.pool._tasks)
    assert pulling.states() == ["live"] * 4
    assert slow.versions == [1]
    assert pulling.pool.restarts.total == 0


async def test_d01_a_worker_that_never_catches_up_is_replaced(
    pools: Pools,
) -> None:
    pulling = pools(*(Puller("fine") for _ in range(3)), Puller(SLOW))
    await pulling.start()
    await pulling.bring(1)
    await pulling.settle()
    assert pulling.ended == [f"{pulling.kind}-3"]
    assert pulling.states() == ["live"] * 4
    assert len(pulling.pullers[3].pulled) == 2 + 2 * MAX_CATCH_UP
    assert pulling.pool.workers[-1].actor.versions == [1]


async def test_a_storage_that_comes_back_before_the_second_try_costs_nothing(
    pools: Pools,
) -> None:
    pulling = pools(*(Puller(SLOW, "fine") for _ in range(4)))
    await pulling.start()
    await pulling.bring(1)
    assert [p.versions for p in pulling.pullers] == [[1]] * 4


async def test_a_worker_whose_weights_are_lost_is_replaced_by_one_that_runs_the_version(
    pools: Pools,
) -> None:
    broken = Puller(WeightError("half of it is replaced"))
    pulling = pools(Puller("fine"), broken)
    await pulling.start()
    broken.healthy = False
    await pulling.bring(1)
    await pulling.settle()
    assert pulling.ended == [f"{pulling.kind}-1"]
    assert [w.actor.versions for w in pulling.pool.live] == [[1], [1]]


async def test_a_version_is_live_only_after_a_worker_that_replaces_the_only_one_runs_it(
    pools: Pools,
) -> None:
    broken = Puller(WeightError("half of it is replaced"))
    pulling = pools(broken)
    await pulling.start()
    broken.healthy = False
    await pulling.bring(1)
    assert [w.actor.versions for w in pulling.pool.live] == [[1]]


async def test_a_worker_that_joins_looks_at_the_target_again_after_its_pull(
    pools: Pools,
) -> None:
    pulling = pools(Puller("fine"))
    await pulling.start()
    await pulling.bring(1)
    joining = Puller("fine")
    take = joining.remote

    def overtaken(version: WeightVersion | None = None) -> Reference:
        if version is not None and version.version == 1:
            pulling.brought.target = make_version(2)  # which the other workers took meanwhile
        return take(version)

    joining.remote = overtaken  # type: ignore[method-assign]
    pulling.pullers.append(joining)
    await pulling.pool.resize(2)
    assert joining.versions == [1, 2]


async def test_a_reference_that_nobody_took_is_asked_for_again_with_the_same_version(
    tmp_path: Path,
) -> None:
    moving = Moving(tmp_path, *(Puller(SLOW, SLOW, "fine") for _ in range(2)))
    await moving.start()
    version = publish(moving.weights, 1, small_model(seed=1))
    with pytest.raises(WeightError, match="the reference of version 1 is not live: 0 of 2 scoring"):
        await moving.client.follow(version)
    assert moving.client.metrics()["scoring/reference_version"] == 0.0
    await moving.client.follow(version)
    assert [puller.versions for puller in moving.pullers] == [[1], [1]]
    assert moving.client.metrics()["scoring/reference_version"] == 1.0


async def test_a_scoring_worker_without_the_newest_reference_scores_nothing(tmp_path: Path) -> None:
    late = Puller("fine", SLOW, SLOW, "never")
    moving = Moving(tmp_path, Puller("fine"), Puller("fine"), late)
    await moving.start()
    await moving.bring(1)
    await moving.bring(2)
    assert moving.states() == ["live", "live", "behind"]
    for _ in range(4):
        async with moving.pool.acquire(prefer=moving.pool.workers[2]) as worker:
            assert worker.actor.versions[-1] == 2
    moving.pool.close()


@BOTH
async def test_n08_a_worker_that_joins_from_a_slow_storage_keeps_its_place_and_catches_up(
    pools: Pools, why: Exception | str
) -> None:
    pulling = pools(Puller("fine"), Puller(why, why, why, "fine"))
    await pulling.pool.start(1)
    await pulling.bring(1)
    await pulling.pool.resize(2)
    assert pulling.states() == ["live", "behind"]
    while pulling.pool._tasks:
        await asyncio.wait(pulling.pool._tasks)
    assert pulling.states() == ["live", "live"]
    assert pulling.ended == []
    assert pulling.pool.restarts.total == 0
    assert pulling.pool.workers[1].actor.versions == [1]


async def test_a_storage_that_refuses_at_once_for_half_a_minute_costs_no_worker_its_place(
    pools: Pools,
) -> None:
    pulling = pools(*(Puller("fine") for _ in range(3)), Puller(SLOW))
    pulling.refuses_until_s = 30.0
    await pulling.start()
    await pulling.bring(1)
    while pulling.states() != ["live"] * 4:
        await pulling.settle()
        assert pulling.ended == []


async def test_n08_one_that_joins_and_never_catches_up_is_replaced(pools: Pools) -> None:
    pulling = pools(Puller("fine"), Puller(SLOW))
    await pulling.pool.start(1)
    await pulling.bring(1)
    await pulling.pool.resize(2)
    await pulling.settle()
    assert pulling.ended == [f"{pulling.kind}-1"]
    assert pulling.states() == ["live", "live"]
    assert pulling.pool.restarts.total == 1
