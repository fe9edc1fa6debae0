"""Workers that start: one that fails, a pool that is closed meanwhile, faults of the system."""

import asyncio

import pytest

from actors.pool import Worker
from rlhf_cluster.errors import PlacementError, PoolLost, WorkerError
from tests.unit.test_pool import Plant


async def test_the_first_that_cannot_start_ends_the_start_of_the_others():
    plant, ended = Plant(), []

    async def launch(name: str) -> Worker:
        if name == "generation-0":
            raise PlacementError(f"{name}: no room")
        try:
            await asyncio.sleep(3600)
        finally:
            ended.append(name)
        raise AssertionError("never")

    plant.pool.launch = launch
    with pytest.raises(PlacementError, match="generation-0: no room"):
        await plant.pool.start(3)
    assert set(ended) <= {"generation-1", "generation-2"}, "or they had not begun"
    plant.pool.launch = plant.launch
    plant.pool.wanted = 0
    await plant.pool.resize(2)
    assert len(plant.names()) == 2
    plant.pool.wanted = 3
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
    await plant.settle()
    assert len(plant.names()) == 3, "nobody waits for a start that is over"


async def test_a_worker_that_is_there_when_its_pool_is_closed_is_ended():
    plant, gate = Plant(), asyncio.Event()

    async def launch(name: str) -> Worker:
        await gate.wait()
        return await plant.launch(name)

    plant.pool.launch = launch
    starting = asyncio.create_task(plant.pool.start(2))
    await plant.settle()
    plant.pool.close()
    gate.set()
    await starting
    assert sorted(plant.retired) == ["generation-0", "generation-1"]
    assert plant.pool.workers == []


async def test_a_growth_that_is_cancelled_gives_the_size_back():
    plant = Plant()
    await plant.pool.start(1)

    async def launch(name: str) -> Worker:
        await asyncio.sleep(3600)
        raise AssertionError("never")

    plant.pool.launch = launch
    growing = asyncio.create_task(plant.pool.resize(3))
    await plant.settle()
    assert plant.pool.wanted == 3
    growing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await growing
    assert plant.pool.wanted == 1
    assert plant.names() == ["generation-0"]


async def test_a_fault_of_the_system_in_a_replacement_fails_the_pool_and_wakes_who_waits():
    plant = Plant(acquire_timeout_s=60.0)
    await plant.pool.start(1)

    async def launch(name: str) -> Worker:
        raise ZeroDivisionError("a bug")

    plant.pool.launch = launch
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))

    async def use() -> None:
        async with plant.pool.acquire():
            pass

    with pytest.raises(PoolLost, match="replacing a worker failed: ZeroDivisionError: a bug"):
        async with asyncio.timeout(5):
            await use()
    with pytest.raises(PoolLost):
        await plant.pool.supervise()
