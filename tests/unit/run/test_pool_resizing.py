"""Sizes of a pool while workers come and go: cancelled changes, changes at once, late replacements."""

import asyncio

import pytest

from rlhf_cluster.errors import PlacementError, PoolLost, WorkerError
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.run.worker_pool import Worker
from tests.unit.run.test_worker_pool import (
    Clock,
    Plant,
)

DIED = WorkerError("the process died")


class GatedPlant(Plant):
    """Launches of the names in `gates` wait for their event; those in `refused` fail after it."""

    def __init__(self, **limits) -> None:
        self.gates: dict[str, asyncio.Event] = {}
        self.refused: set[str] = set()
        super().__init__(**limits)

    def hold(self, *numbers: int) -> None:
        self.gates |= {f"generation-{number}": asyncio.Event() for number in numbers}

    def let(self, number: int) -> None:
        self.gates[f"generation-{number}"].set()

    async def launch(self, name: str) -> Worker:
        if name in self.gates:
            await self.gates[name].wait()
        if name in self.refused:
            raise PlacementError(f"{name}: no room")
        return await super().launch(name)


async def test_d09_a_scale_down_beside_a_replacement_keeps_the_workers_that_live():
    plant = GatedPlant()
    plant.hold(3)
    await plant.pool.start(3)
    await plant.pool.fail(plant.pool.live[0], DIED)
    await plant.settle()
    assert await plant.pool.resize(2) == "generation: 2 workers"
    assert plant.names() == ["generation-1", "generation-2"], "the size was right already"
    plant.let(3)
    await plant.settle()
    assert plant.names() == ["generation-1", "generation-2"]
    assert plant.retired == ["generation-0", "generation-3"], "its place is gone"


async def test_d09_the_replacement_of_a_new_worker_does_not_outlive_a_refused_growth():
    plant = GatedPlant()
    plant.hold(3)
    plant.refused.add("generation-3")
    await plant.pool.start(2)
    growing = asyncio.create_task(plant.pool.resize(4))
    await plant.settle()
    await plant.pool.fail(plant.pool.live[-1], DIED)
    await plant.settle()
    assert plant.names() == ["generation-0", "generation-1", "generation-4"]
    plant.let(3)
    with pytest.raises(PlacementError, match="generation-3: no room"):
        await growing
    assert (plant.pool.wanted, len(plant.names())) == (2, 2)


async def test_d09_a_new_worker_of_a_refused_growth_stands_in_for_one_that_died():
    plant = GatedPlant()
    plant.hold(3, 4)
    plant.refused.add("generation-3")
    await plant.pool.start(2)
    growing = asyncio.create_task(plant.pool.resize(4))
    await plant.settle()
    await plant.pool.fail(plant.pool.live[0], DIED)
    await plant.settle()
    plant.let(3)
    with pytest.raises(PlacementError):
        await growing
    assert plant.names() == ["generation-1", "generation-2"], "nobody is ended to be started again"
    plant.let(4)
    await plant.settle()
    assert plant.names() == ["generation-1", "generation-2"]


async def test_d09_changes_of_size_come_one_after_the_other():
    plant = GatedPlant()
    plant.hold(3)
    plant.refused.add("generation-3")
    await plant.pool.start(2)
    growing = asyncio.create_task(plant.pool.resize(4))
    await plant.settle()
    shrinking = asyncio.create_task(plant.pool.resize(1))
    await plant.settle()
    plant.let(3)
    with pytest.raises(PlacementError):
        await growing
    assert await shrinking == "generation: 1 workers"
    assert plant.pool.wanted == 1


async def test_d09_a_scale_down_that_is_cancelled_still_ends_whom_it_drains():
    plant = Plant(drain_timeout_s=3600.0)
    await plant.pool.start(2)
    async with plant.pool.acquire(), plant.pool.acquire():
        shrinking = asyncio.create_task(plant.pool.resize(1))
        await plant.settle()
        shrinking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await shrinking
        assert plant.retired == [], "its work is under way"
    await plant.settle()
    assert (len(plant.retired), len(plant.names())) == (1, 1)
    assert await plant.pool.resize(2) == "generation: 2 workers"


async def test_the_first_cause_is_that_of_the_restarts_that_count():
    plant, clock = Plant(max_restarts=1, acquire_timeout_s=5.0), Clock()
    plant.pool.restarts = RestartWindow(100.0, clock)
    await plant.pool.start(1)
    await plant.pool.fail(plant.pool.live[0], WorkerError("a cable, weeks ago"))
    await plant.settle()
    clock.now = 1000.0
    for _ in range(2):
        await plant.pool.fail(plant.pool.live[0], WorkerError("CUDA error: device lost"))
        await plant.settle()
    with pytest.raises(PoolLost, match="First cause: CUDA error: device lost"):
        await plant.pool.supervise()


async def test_a_place_without_room_spends_no_restarts_while_the_quorum_lives():
    plant, told = Plant(max_restarts=3, acquire_timeout_s=5.0), []
    plant.pool.tell = told.append
    await plant.pool.start(2)
    plant.unlaunchable = True
    await plant.pool.fail(plant.pool.live[0], WorkerError("the node is gone"))
    for _ in range(10):
        await plant.settle()
    assert len(plant.launched) > 10
    assert told == ["generation: a replacement waits for room: generation-2: no room"]
    assert (plant.pool.restarts.total, plant.pool.num_live) == (1, 1)
    plant.unlaunchable = False
    await plant.settle()
    assert plant.pool.num_live == 2
    plant.unlaunchable = True
    for worker in plant.pool.live:
        await plant.pool.fail(worker, DIED)
    for _ in range(10):
        await plant.settle()
    with pytest.raises(PoolLost, match="First cause: the node is gone"):
        await plant.pool.supervise()
