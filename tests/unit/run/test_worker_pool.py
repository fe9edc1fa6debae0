import asyncio

import pytest

from rlhf_cluster.errors import PlacementError, PoolLost, StalledError, WorkerError
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    State,
    Worker,
    WorkerPool,
)


class Plant:
    """Launches fake workers. `broken` names fail their check, `unlaunchable` fail to start."""

    def __init__(self, **limits) -> None:
        self.retired: list[str] = []
        self.broken: set[str] = set()
        self.unlaunchable = False
        self.slept: list[float] = []
        self.launched: list[str] = []
        self.pool = WorkerPool(
            kind="generation",
            launch=self.launch,
            retire=lambda worker: self.retired.append(worker.name),
            check=self.check,
            limits=PoolLimits(**({"acquire_timeout_s": 0.2, "drain_timeout_s": 5.0} | limits)),
            sleep=self.sleep,
        )

    async def launch(self, name: str) -> Worker:
        await asyncio.sleep(0)
        self.launched.append(name)
        if self.unlaunchable:
            raise PlacementError(f"{name}: no room")
        return Worker(name=name, actor=name, placement=None)

    async def check(self, worker: Worker) -> None:
        if worker.name in self.broken:
            raise WorkerError(f"{worker.name}: engine dead")

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0)

    def names(self) -> list[str]:
        return sorted(w.name for w in self.pool.live)

    async def settle(self) -> None:
        for _ in range(50):
            await asyncio.sleep(0)


async def test_work_goes_to_the_least_loaded_worker():
    plant = Plant()
    await plant.pool.start(2)
    async with plant.pool.acquire() as first, plant.pool.acquire() as second:
        assert first is not second
        async with plant.pool.acquire():
            assert sorted(w.num_in_flight for w in plant.pool.live) == [1, 2]
    assert [w.num_in_flight for w in plant.pool.live] == [0, 0]


async def test_a_failed_worker_is_retired_once_and_replaced():
    plant = Plant()
    await plant.pool.start(2)
    victim = plant.pool.live[0]
    error = WorkerError("generation-0.generate: the process died")
    await asyncio.gather(*(plant.pool.fail(victim, error) for _ in range(5)))
    await plant.settle()
    assert plant.retired == ["generation-0"]
    assert plant.names() == ["generation-1", "generation-2"]
    assert plant.pool.restarts.total == 1
    assert "process died" in plant.pool.describe_errors()


async def test_workers_that_are_lost_at_once_are_replaced_one_for_one():
    """The first replacement is up while the second still starts."""
    plant = Plant()
    await plant.pool.start(2)
    gates = [asyncio.Event(), asyncio.Event()]
    begun = []

    async def launch(name: str) -> Worker:
        begun.append(name)
        await gates[len(begun) - 1].wait()
        return Worker(name=name, actor=name, placement=None)

    plant.pool.launch = launch
    error = WorkerError("the node is gone")
    for victim in plant.pool.live:
        await plant.pool.fail(victim, error)
    for gate in gates:
        await plant.settle()
        assert begun == ["generation-2", "generation-3"]
        gate.set()
    await plant.settle()
    assert plant.names() == begun == ["generation-2", "generation-3"]


async def test_the_others_are_launched_by_whoever_is_left_when_one_fails_to_start():
    plant = Plant(max_restarts=20)
    await plant.pool.start(2)
    plant.unlaunchable = True
    for victim in plant.pool.live:
        await plant.pool.fail(victim, WorkerError("the node is gone"))
    for _ in range(3):
        await asyncio.sleep(0)
    plant.unlaunchable = False
    await plant.settle()
    assert len(plant.names()) == 2


async def test_supervision_finds_a_worker_that_fails_its_check():
    plant = Plant()
    await plant.pool.start(2)
    plant.broken.add("generation-1")
    watch = asyncio.create_task(plant.pool.supervise())
    await plant.settle()
    watch.cancel()
    assert plant.names() == ["generation-0", "generation-2"]


async def test_scaling_up_adds_and_scaling_down_drains_without_losing_work():
    plant = Plant()
    await plant.pool.start(1)
    assert await plant.pool.resize(3) == "generation: 3 workers"
    async with plant.pool.acquire() as busy:
        shrink = asyncio.create_task(plant.pool.resize(1))
        await plant.settle()
        assert plant.names() == [busy.name], "the idle ones went, the busy one stayed"
        await shrink
    async with plant.pool.acquire() as busy:
        busy.state = State.DRAINING
        shrink = asyncio.create_task(plant.pool.resize(1))
        await plant.settle()
        assert busy.name not in plant.retired, "its work is still under way"
    await shrink
    assert busy.name in plant.retired


async def test_a_draining_worker_gets_no_new_work():
    plant = Plant()
    await plant.pool.start(1)
    plant.pool.live[0].state = State.DRAINING
    with pytest.raises(StalledError, match="no live generation worker for 0.2 s"):
        async with plant.pool.acquire():
            pass


async def test_a_worker_that_drains_gets_no_work_though_a_caller_prefers_it():
    plant = Plant()
    await plant.pool.start(2)
    draining, other = plant.pool.live
    draining.state = State.DRAINING
    async with plant.pool.acquire(prefer=draining) as worker:
        assert worker is other


async def test_scaling_up_beyond_the_cluster_fails_and_keeps_the_old_size():
    plant = Plant()
    await plant.pool.start(1)
    plant.unlaunchable = True
    with pytest.raises(PlacementError, match="no room"):
        await plant.pool.resize(2)
    assert plant.pool.wanted == 1
    assert plant.names() == ["generation-0"]


async def test_nothing_is_launched_for_a_size_that_the_cluster_cannot_hold():
    plant = Plant()
    await plant.pool.start(1)

    def full(wanted: int) -> None:
        raise PlacementError(f"no node has room for {wanted}")

    plant.pool.preflight = full
    with pytest.raises(PlacementError, match="no node has room for 500"):
        await plant.pool.resize(500)
    assert plant.pool.wanted == 1
    assert plant.launched == ["generation-0"]
    await plant.pool.resize(0)
    assert plant.names() == []


async def test_a_growth_that_fails_half_way_ends_what_it_started():
    plant = Plant()
    await plant.pool.start(1)
    launch = plant.pool.launch

    async def third_fails(name: str) -> Worker:
        if name == "generation-3":
            await asyncio.sleep(0.01)
            raise PlacementError(f"{name}: no room")
        if name == "generation-4":
            await asyncio.sleep(3600)
        return await launch(name)

    plant.pool.launch = third_fails
    with pytest.raises(PlacementError, match="generation-3: no room"):
        await plant.pool.resize(5)
    assert plant.names() == ["generation-0"]
    assert sorted(plant.retired) == ["generation-1", "generation-2"]
    assert plant.pool.wanted == 1


async def test_a_crash_loop_ends_with_the_first_cause_and_backs_off():
    plant = Plant(max_restarts=3, acquire_timeout_s=5.0)
    await plant.pool.start(1)
    plant.unlaunchable = True
    await plant.pool.fail(plant.pool.live[0], WorkerError("CUDA error: device lost"))
    with pytest.raises(
        PoolLost, match="4 restarts within 3600 s, more than 3, and 0 of at least 1 .*: CUDA error"
    ):
        async with plant.pool.acquire():
            pass
    assert plant.slept == sorted(plant.slept)
    assert len(plant.slept) == 3
    with pytest.raises(WorkerError, match="First cause"):
        await plant.pool.supervise()


async def test_a_replacement_wakes_those_who_wait_for_a_worker():
    plant = Plant(acquire_timeout_s=5.0)
    await plant.pool.start(1)
    await plant.pool.fail(plant.pool.live[0], WorkerError("gone"))
    async with plant.pool.acquire() as worker:
        assert worker.name == "generation-1"


async def test_a_full_worker_keeps_work_waiting_and_a_finished_call_lets_it_on():
    plant = Plant(max_in_flight=1, acquire_timeout_s=0.01)
    await plant.pool.start(1)

    async def work() -> None:
        async with plant.pool.acquire():
            pass

    async with plant.pool.acquire() as busy:
        waiting = asyncio.create_task(work())
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done, "being busy for long is no stall"
        assert busy.num_in_flight == 1
    async with asyncio.timeout(5):
        await waiting


async def test_a_worker_in_quarantine_ends_its_work_and_is_replaced_within_the_budget():
    plant = Plant(max_restarts=1)
    told: list[str] = []
    plant.pool.tell = told.append
    await plant.pool.start(2)  # so that two may be replaced
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
    await plant.settle()
    assert (plant.pool.restarts.total, plant.retired.pop(), plant.launched.pop(0)) == (
        *(1, "generation-0"),
        "generation-0",
    )
    async with plant.pool.acquire() as slow:
        await plant.pool.quarantine(slow, "slow")
        await plant.settle()
        assert plant.retired == [], "its work is under way"
        assert slow.name not in plant.names()
        assert len(plant.launched) == 2, "its place is needed for the next one"
    await plant.settle()
    assert plant.retired == [slow.name]
    assert len(plant.names()) == 2
    assert (plant.pool.num_quarantined, plant.pool.restarts.total) == (1, 2)
    assert told == [f"{slow.name}: quarantined: slow"]
    assert "quarantined: slow" in plant.pool.describe_errors()
    await plant.pool.quarantine(slow, "again")
    await plant.pool.quarantine(plant.pool.live[0], "slow too")
    await plant.settle()
    assert plant.pool.num_quarantined == 1, "nothing is left to replace it with"
    assert len(plant.names()) == 2


async def test_faults_without_a_restart_left_fail_the_pool_with_the_first_cause():
    plant = Plant(max_restarts=0, min_workers=2, acquire_timeout_s=5.0)
    await plant.pool.start(2)
    await plant.pool.quarantine(plant.pool.live[0], "5 groups failed on it", needed=True)
    await plant.settle()
    with pytest.raises(PoolLost, match="First cause: generation-0: quarantined: 5 groups failed"):
        await plant.pool.supervise()


async def test_the_only_worker_is_replaced_at_once():
    plant = Plant()
    await plant.pool.start(1)
    async with plant.pool.acquire() as only:
        await plant.pool.quarantine(only, "faults", needed=True)
        await plant.settle()
        assert plant.names() == ["generation-1"]
    assert plant.retired == ["generation-0"]


async def test_a_worker_that_dies_in_quarantine_is_replaced_once():
    plant = Plant()
    await plant.pool.start(2)
    async with plant.pool.acquire() as slow:
        await plant.pool.quarantine(slow, "slow")
        await plant.pool.fail(slow, WorkerError("the process died"))
    await plant.settle()
    assert plant.retired == [slow.name]
    assert len(plant.names()) == 2
    assert plant.pool.restarts.total == 1


async def test_those_who_wait_for_room_get_it_in_the_order_of_their_coming():
    plant = Plant(max_in_flight=1, acquire_timeout_s=60.0)
    await plant.pool.start(2)
    served: list[int] = []

    async def work(number: int) -> None:
        async with plant.pool.acquire():
            served.append(number)
            await asyncio.sleep(0)

    async with plant.pool.acquire(), plant.pool.acquire():
        calls = [asyncio.create_task(work(number)) for number in range(6)]
        await plant.settle()
        assert served == []
        calls[0].cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert served == [1, 2, 3, 4, 5]
    assert plant.pool._waiting == type(plant.pool._waiting)()


async def test_a_turn_whose_owner_gave_up_at_that_moment_passes_on():
    plant = Plant(max_in_flight=1, acquire_timeout_s=60.0)
    await plant.pool.start(1)

    async def work() -> None:
        async with plant.pool.acquire():
            pass

    async with plant.pool.acquire():
        first, second = asyncio.create_task(work()), asyncio.create_task(work())
        await plant.settle()
    first.cancel()  # it was woken, and has not run since
    async with asyncio.timeout(30):
        await second
        await asyncio.gather(first, return_exceptions=True)
    assert first.cancelled()


async def test_a_worker_that_dies_while_it_is_drained_holds_nobody_up():
    plant = Plant(drain_timeout_s=3600.0)
    await plant.pool.start(2)
    async with plant.pool.acquire() as first, plant.pool.acquire() as second:
        shrink = asyncio.create_task(plant.pool.resize(1))
        await plant.settle()
        [drained] = [each for each in (first, second) if each.state is State.DRAINING]
        await plant.pool.fail(drained, WorkerError("the process died"))
        async with asyncio.timeout(30):
            await shrink
    assert len(plant.names()) == 1


async def test_after_its_end_a_pool_gives_no_work():
    plant = Plant()
    await plant.pool.start(1)
    plant.pool.close()
    assert plant.pool.num_live == 0
    with pytest.raises(StalledError):
        async with plant.pool.acquire():
            pass


async def test_d09_a_refused_growth_leaves_the_replacement_of_a_worker_that_died_meanwhile():
    plant, refuse = Plant(), asyncio.Event()
    await plant.pool.start(2)

    async def launch(name: str) -> Worker:
        if name == "generation-2":  # the one that grows
            await refuse.wait()
            raise PlacementError(f"{name}: no room")
        return await plant.launch(name)

    plant.pool.launch = launch
    growing = asyncio.create_task(plant.pool.resize(3))
    await plant.settle()
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
    await plant.settle()
    assert plant.names() == ["generation-1", "generation-3"]
    refuse.set()
    with pytest.raises(PlacementError):
        await growing
    await plant.settle()
    assert plant.names() == ["generation-1", "generation-3"]
    assert plant.pool.wanted == 2


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_half_of_a_large_pool_may_be_lost_at_once():
    plant = Plant()
    await plant.pool.start(64)
    for worker in plant.pool.live[:32]:
        await plant.pool.fail(worker, WorkerError("the rack is gone"))
    await plant.settle()
    assert plant.pool.num_live == 64
    assert max(plant.slept) == 1.0, "32 of 64 at once is no crash loop to back off from"


async def test_restarts_leave_their_window():
    plant, clock = Plant(max_restarts=2), Clock()
    plant.pool.restarts = RestartWindow(100.0, clock)
    await plant.pool.start(1)
    for _ in range(10):
        await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
        await plant.settle()
        clock.now += 50.0
    assert (plant.pool.restarts.total, plant.pool.restarts.recent) == (10, 1)
    assert plant.pool.num_live == 1


async def test_without_restarts_a_pool_lives_on_its_quorum_until_the_window_allows_one_more():
    plant, clock = Plant(max_restarts=4, min_workers=2), Clock()

    async def sleep(seconds: float) -> None:
        plant.slept.append(seconds)
        await asyncio.sleep(0)
        if seconds > 30:
            clock.now += seconds

    plant.pool.restarts, plant.pool.sleep = RestartWindow(100.0, clock), sleep
    await plant.pool.start(4)
    for _ in range(4):
        await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
        await plant.settle()
    assert plant.pool.num_live == 4
    plant.slept.clear()
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
    await plant.settle()
    assert plant.slept[0] == pytest.approx(100.0), "until the oldest restart is out of the window"
    assert plant.pool.num_live == 4


async def test_below_its_quorum_a_pool_without_restarts_fails():
    plant = Plant(max_restarts=1, min_workers=3, acquire_timeout_s=5.0)
    await plant.pool.start(4)
    plant.unlaunchable = True
    for worker in plant.pool.live[:2]:
        await plant.pool.fail(worker, WorkerError("the process died"))
    await plant.settle()
    with pytest.raises(PoolLost, match="more than 4, and 2 of at least 3 workers live"):
        await plant.pool.supervise()


async def test_a_pool_that_may_never_restart_lives_on_its_quorum():
    plant = Plant(max_restarts=0)
    await plant.pool.start(3)
    await plant.pool.fail(plant.pool.live[0], WorkerError("the process died"))
    await plant.settle()
    assert (plant.pool.num_live, len(plant.launched)) == (2, 3)
    async with plant.pool.acquire():
        pass


@pytest.mark.parametrize("error", [ValueError("no such actor"), OSError("no answer")])
async def test_n15_a_worker_that_cannot_be_ended_is_replaced_and_ended_later(error):
    plant, told = Plant(), list[str]()
    plant.pool.tell, retire, fails = told.append, plant.pool.retire, [True]

    def failing(worker: Worker) -> None:
        if fails[0]:
            raise error
        retire(worker)

    plant.pool.retire = failing
    await plant.pool.start(4)
    await plant.pool.fail(plant.pool.live[0], WorkerError("dead"))
    await plant.settle()
    assert plant.names() == [f"generation-{number}" for number in (1, 2, 3, 4)]
    assert plant.pool.restarts.total == 1
    assert told == [
        f"generation-0 could not be ended ({type(error).__name__}: {error}); it is tried again, and "
        "may hold its place until then"
    ]
    plant.broken.add("generation-1")  # found by the supervision, which lives on
    watch = asyncio.create_task(plant.pool.supervise())
    await plant.settle()
    assert len(plant.names()) == 4
    fails[0] = False
    await plant.settle()
    watch.cancel()
    assert plant.retired == ["generation-0", "generation-1"], "each once"


async def test_n15_one_that_cannot_be_ended_at_the_close_keeps_no_other():
    plant = Plant()
    await plant.pool.start(3)
    retire = plant.pool.retire

    def failing(worker: Worker) -> None:
        if worker.name == "generation-0":
            raise ValueError("no such actor")
        retire(worker)

    plant.pool.retire = failing
    plant.pool.close()
    assert plant.retired == ["generation-1", "generation-2"]
    assert plant.pool.workers == []
