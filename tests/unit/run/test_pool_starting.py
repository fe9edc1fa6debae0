"""Workers that start: one that fails, a pool that is closed meanwhile, faults of the system."""

import asyncio

import pytest

from rlhf_cluster.errors import PlacementError, PoolLost, WorkerError
from rlhf_cluster.run.worker_pool import Worker
from tests.unit.run.test_worker_pool import Plant


async def test_the_first_that_cannot_start_ends_the_start_of_the_others():
    plant, ended = Plant(min_workers=3), []

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


async def test_one_bad_node_does_not_end_a_start_that_has_its_quorum():
    plant, told, broken = Plant(join_grace_s=0.0), [], True
    plant.pool.tell = told.append

    async def launch(name: str) -> Worker:
        if broken and name == "generation-2":
            raise PlacementError(f"{name}: no room")
        return await plant.launch(name)

    plant.pool.launch = launch
    await plant.pool.start(4)
    assert plant.pool.num_live == 3
    assert told == [
        "generation: started with 3 of 4 workers, 0 still starting, 1 failed; generation-2: no room"
    ]
    await plant.settle()
    assert plant.names() == ["generation-0", "generation-1", "generation-3", "generation-4"]
    assert plant.pool.restarts.total == 1


async def test_a_start_leaves_slow_nodes_behind_and_they_join_later():
    plant, gate, told = Plant(join_grace_s=0.0), asyncio.Event(), []
    plant.pool.tell = told.append

    async def launch(name: str) -> Worker:
        if name in ("generation-0", "generation-1"):
            await gate.wait()
        if name == "generation-1":
            raise PlacementError(f"{name}: no room")
        return await plant.launch(name)

    plant.pool.launch = launch
    await plant.pool.start(4)
    assert plant.names() == ["generation-2", "generation-3"]
    assert told == ["generation: started with 2 of 4 workers, 2 still starting, 0 failed"]
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
    gate.set()
    await plant.settle()
    assert len(plant.names()) == 4, "one joined late, two were replaced"
    assert plant.pool.restarts.total == 2


async def test_a_start_without_its_quorum_waits_for_it_and_ends_when_it_is_out_of_reach():
    plant, gates = Plant(join_grace_s=0.0, min_workers=2), [asyncio.Event() for _ in range(3)]

    async def launch(name: str) -> Worker:
        number = int(name[-1])
        await gates[number].wait()
        if number:
            raise PlacementError(f"{name}: no room")
        return await plant.launch(name)

    plant.pool.launch = launch
    starting = asyncio.create_task(plant.pool.start(3))
    for gate in gates[:2]:
        gate.set()
        await plant.settle()
        assert not starting.done(), "one of two that are needed, and one may still come"
    gates[2].set()
    with pytest.raises(PlacementError, match="generation-1: no room"):
        await starting


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

    with pytest.raises(PoolLost, match="a change of workers failed: ZeroDivisionError: a bug"):
        async with asyncio.timeout(5):
            await use()
    with pytest.raises(PoolLost):
        await plant.pool.supervise()
