"""How calls of a pool are tried on its workers, with actors and references that are none of Ray's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, ClassVar

import pytest
from ray.exceptions import RayTaskError

from actors.cluster.calls import answer
from actors.services.generation_client import Abandoned, try_workers
from actors.services.start_services import (
    GENERATION_CALLS,
    Launcher,
    generation_pool,
    scoring_pools,
)
from actors.services.worker_actors import HEALTH_GROUP, ScoringActor
from rlhf_cluster.errors import (
    DataError,
    RecordError,
    ScoringError,
    StalledError,
    StoreError,
    WorkerError,
    WorkerSilent,
)
from rlhf_cluster.run.worker_pool import PoolLimits, State, Worker, WorkerPool
from rlhf_cluster.util.waiting import reply_deadline
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.weight_pullers import Puller, Pulling, Reference


class Calls:
    """A pool of `size` workers whose n-th call gives `answers[n]`; who was asked, who was checked."""

    def __init__(self, size: int, *answers: Reference) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.checked: list[str] = []
        self.retries = 0
        self.pool = WorkerPool(
            kind="generation",
            launch=self._launch,
            retire=lambda worker: None,
            check=self._check,
            limits=PoolLimits(acquire_timeout_s=5.0),
        )
        self._size = size

    async def _launch(self, name: str) -> Worker:
        return Worker(name=name, actor=name, placement=None)

    async def _check(self, worker: Worker) -> None:
        self.checked.append(worker.name)

    def _call(self, worker: Worker) -> tuple[Any, str]:
        self.asked.append(worker.name)
        return self.answers.pop(0), "handle"

    def _retried(self) -> None:
        self.retries += 1

    async def tried(self, max_retries: int = 2, timeout_s: float = 5.0) -> Any:
        await self.pool.start(self._size)
        return await try_workers(
            self.pool,
            None,  # type: ignore[arg-type]
            self._call,
            "generate(g00000001)",
            timeout_s,
            max_retries,
            self._retried,
        )


ELSEWHERE: list[Callable[[str], Exception]] = [
    WorkerError,
    ScoringError,
    StalledError,
    RecordError,
    DataError,
]


@pytest.mark.parametrize("error", ELSEWHERE)
async def test_d05_what_a_worker_raised_is_tried_on_another_one_after_a_check(error: Any) -> None:
    calls = Calls(2, Reference(error("a log-probability is nan")), Reference("fine"))
    found = await calls.tried()
    assert (found.summary, found.num_failed, calls.retries) == ("fine", 1, 1)
    assert calls.asked == ["generation-0", "generation-1"]
    assert calls.checked == ["generation-0"]
    assert calls.pool.restarts.total == 0, "it can serve on"


@pytest.mark.parametrize(("error", "raised"), [(e, e) for e in ELSEWHERE if e is not StalledError])
async def test_d05_an_error_that_outlives_its_retries_keeps_its_kind(
    error: Any, raised: Any
) -> None:
    calls = Calls(2, *(Reference(error("a log-probability is nan")) for _ in range(3)))
    with pytest.raises(
        raised, match=r"generation-0.generate\(g00000001\): a log-probability is nan"
    ):
        await calls.tried()
    assert len(calls.asked) == 3


async def test_a_stall_in_every_worker_is_the_groups_and_not_the_runs() -> None:
    calls = Calls(1, *(Reference(StalledError("no token for 600 s")) for _ in range(3)))
    with pytest.raises(WorkerError, match="no token for 600 s"):
        await calls.tried()


async def test_d05_an_error_that_every_group_would_meet_is_raised_at_once() -> None:
    calls = Calls(2, Reference(StoreError("disk full")))
    with pytest.raises(StoreError, match="disk full"):
        await calls.tried()
    assert calls.asked == ["generation-0"]


async def test_a_silent_worker_is_replaced_and_its_call_tried_elsewhere() -> None:
    calls = Calls(2, Reference(never=True), Reference("fine"))
    found = await calls.tried(timeout_s=0.01)
    assert found.summary == "fine"
    await asyncio.sleep(0)
    assert calls.pool.restarts.total == 1


class Given:
    """A call that was given up, which ends when it is told to."""

    def __init__(self) -> None:
        self.ends: Future[Any] = Future()
        self.cancelled = False

    def future(self) -> Future[Any]:
        return self.ends


def given_up(size: int, clock: Callable[[], float]) -> tuple[Pulling, Abandoned]:
    pulling = Pulling(*(Puller("fine") for _ in range(size)))
    return pulling, Abandoned(pulling.pool, clock, lambda call: setattr(call, "cancelled", True))


async def test_d06_busy_workers_are_waited_for_until_the_deadline_of_their_calls() -> None:
    pulling, abandoned = given_up(12, lambda: 100.0)
    await pulling.start()
    calls = [Given() for _ in range(12)]
    for worker, call in zip(pulling.pool.live, calls, strict=True):
        abandoned.add(worker, call, ends=400.0)
    ending = asyncio.create_task(abandoned.end())
    await pulling.settle()
    assert all(call.cancelled for call in calls)
    assert not ending.done()
    for call in calls:
        call.ends.set_result("nobody wants it")
    async with asyncio.timeout(5):
        await ending
    assert pulling.pool.restarts.total == 0
    assert pulling.states() == ["live"] * 12


async def test_d06_what_is_left_of_a_calls_own_deadline_is_waited_for() -> None:
    waited: list[float] = []

    async def wait(reference: Any, timeout_s: float, what: str) -> None:
        waited.append(timeout_s)

    pulling = Pulling(Puller("fine"))
    await pulling.start()
    abandoned = Abandoned(pulling.pool, lambda: 100.0, lambda call: None, wait)
    for ends in (400.0, 90.0):
        abandoned.add(pulling.pool.live[0], Given(), ends)
    await abandoned.end()
    assert waited == [300.0, 0.0]


async def test_a_worker_that_is_busy_after_the_deadline_of_its_call_is_replaced() -> None:
    pulling, abandoned = given_up(2, lambda: 100.0)
    await pulling.start()
    abandoned.add(pulling.pool.live[0], Given(), ends=100.01)
    await abandoned.end()
    assert pulling.ended == ["generation-0"]


async def test_d15_calls_that_ended_and_dead_workers_are_not_kept() -> None:
    pulling, abandoned = given_up(1, lambda: 0.0)
    await pulling.start()
    worker = pulling.pool.live[0]
    for _ in range(50):
        call = Given()
        abandoned.add(worker, call, ends=10.0)
        call.ends.set_result("ended")
    assert len(abandoned) == 1
    abandoned.add(worker, Given(), ends=10.0)
    worker.state = State.RETIRED
    abandoned.add(Worker(name="other", actor=None, placement=None), Given(), ends=10.0)
    assert len(abandoned) == 1, "only the last one"


@pytest.mark.parametrize("timeout_s", [0.01, 1.0, 60.0, 120.0, 600.0, 7200.0])
def test_d07_a_caller_waits_longer_than_the_callee_may_take(timeout_s: float) -> None:
    margin_s = reply_deadline(timeout_s) - timeout_s
    assert margin_s >= 0.5
    assert margin_s <= 30.0 + 1e-9
    whole = reply_deadline(timeout_s, timeout_s)
    assert whole > 2 * timeout_s + 0.5


async def test_d07_a_worker_says_itself_that_a_group_is_late() -> None:
    """Its deadline passes while the caller still waits, whose own error would have killed it."""
    reference, timeout_s = Reference(never=True), 0.05

    async def worker() -> None:
        await asyncio.sleep(timeout_s)
        late = StalledError("group g00000001 was not sampled")
        reference.future().set_exception(RayTaskError("generate", "its stack", late))

    task = asyncio.create_task(worker())
    with pytest.raises(StalledError, match="g00000001 was not sampled"):
        await answer(reference, timeout_s, "generation-0.generate")  # type: ignore[arg-type]
    await task


async def test_d04_an_answer_that_arrived_while_the_loop_was_held_up_wins_over_the_timer() -> None:
    reference = Reference(never=True)
    asked = asyncio.create_task(answer(reference, 0.01, "generation-0.health"))  # type: ignore[arg-type]
    await asyncio.sleep(0)

    def hold_up() -> None:
        reference.future().set_result("healthy")
        ends = time.monotonic() + reply_deadline(0.01) + 0.05
        while time.monotonic() < ends:
            pass

    asyncio.get_running_loop().call_soon(hold_up)
    assert await asked == "healthy"


async def test_a_silent_worker_is_told_by_its_call_and_the_seconds_waited() -> None:
    with pytest.raises(WorkerSilent, match=r"generation-0.health: no answer within 0.5\d* s"):
        await answer(Reference(never=True), 0.01, "generation-0.health")  # type: ignore[arg-type]


async def test_d08_more_groups_than_an_engine_takes_wait_in_the_pool() -> None:
    launcher = Launcher(
        config=tiny_config(), model_dir="", engine_factory="", engine_environment={}
    )
    pool, _ = generation_pool(launcher)
    assert pool.limits.max_in_flight == GENERATION_CALLS
    pool.launch = lambda name: asyncio.sleep(0, Worker(name=name, actor=None, placement=None))
    await pool.start(1)
    [worker], most, ended = pool.live, 0, 0

    async def group() -> None:
        nonlocal most, ended
        async with pool.acquire():
            most = max(most, worker.num_in_flight)
            await asyncio.sleep(0)
        ended += 1

    await asyncio.gather(*(group() for _ in range(1500)))
    assert (ended, most) == (1500, GENERATION_CALLS)


class Asked(Exception):
    """The options of an actor that is about to be made."""


class NoActors:
    config, model_dir, engine_factory = tiny_config(), "", ""
    engine_environment: ClassVar[dict[str, str]] = {}

    async def actor(self, cls: type, arguments: list[Any], bundle: Any, **options: Any) -> None:
        raise Asked(options)


async def test_d08_actors_have_room_for_control_calls_beside_all_calls_for_groups() -> None:
    launcher: Any = NoActors()
    for pool in (generation_pool(launcher)[0], *scoring_pools(launcher)[0]):
        with pytest.raises(Asked) as asked:
            await pool.launch(f"{pool.kind}-0")
        assert pool.limits.max_in_flight is not None
        assert asked.value.args[0]["max_concurrency"] >= pool.limits.max_in_flight + 2


def test_d08_health_of_a_scoring_worker_has_a_thread_of_its_own() -> None:
    assert ScoringActor.health.__ray_concurrency_group__ == HEALTH_GROUP  # type: ignore[attr-defined]
