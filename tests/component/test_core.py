"""How the driver notices that a learner rank or the buffer is gone, and what it asks of the pools then.

No cluster is needed: a reference is a future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from actors.calls import WorkerDied, answer, core_answer
from actors.clients import RayGeneration, RayScoring
from actors.core import Core, Member
from actors.engine import LoadedWeights
from actors.learner import RayLearner
from actors.pool import PoolLimits, Worker, WorkerPool
from actors.services import Launcher
from rlhf_cluster.errors import CoreLost, DivergenceError, WorkerError
from rlhf_cluster.records import Sampling, Ticket
from tests.configs import tiny_config
from tests.fakes import make_prompt, make_version


class Reference:
    """What a call returns; it is answered, fails, or is never heard of."""

    def __init__(self) -> None:
        self.result: Future[Any] = Future()

    def future(self) -> Future[Any]:
        """One of its own for each that waits, as with Ray."""
        waiter: Future[Any] = Future()

        def tell(result: Future[Any]) -> None:
            if waiter.set_running_or_notify_cancel():
                error = result.exception()
                waiter.set_exception(error) if error else waiter.set_result(result.result())

        self.result.add_done_callback(tell)
        return waiter

    def answered(self, value: Any = None) -> Reference:
        self.result.set_result(value)
        return self

    def died(self) -> Reference:
        self.result.set_exception(ActorDiedError())
        return self


class Actor:
    """Each method is called with `.remote`, or with `.options(...).remote`."""

    def __init__(self, **methods: Callable[..., Reference]) -> None:
        self.calls: list[str] = []
        for name, method in methods.items():
            setattr(self, name, _Method(name, method, self.calls))


class _Method:
    def __init__(self, name: str, call: Callable[..., Reference], calls: list[str]) -> None:
        self._name, self._call, self._calls = name, call, calls

    def options(self, **_: Any) -> _Method:
        return self

    def remote(self, *arguments: Any) -> Reference:
        self._calls.append(self._name)
        return self._call(*arguments)


def core_of(silence_s: float = 60.0, **presence: Callable[[float], Reference]) -> Core:
    config = tiny_config(cluster={"heartbeat_timeout_s": silence_s})
    core = Core(Launcher(config=config, model_dir="", engine_factory="", engine_environment={}))
    core.members += [
        Member(name=name.replace("_", "-"), actor=Actor(present=call), placement=None)
        for name, call in presence.items()
    ]
    return core


def alive(after_s: float) -> Reference:
    """Answers at once where it was asked to, and else not before the test is over."""
    return Reference() if after_s else Reference().answered()


def dead(after_s: float) -> Reference:
    return Reference().died()


async def wait_for_ever() -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("victim", ["learner_1", "buffer"])
async def test_a_death_ends_the_block_without_a_call_to_who_died(victim: str):
    members = {"learner_0": alive, "learner_1": alive, "buffer": alive, victim: dead}
    with pytest.raises(CoreLost, match=f"{victim.replace('_', '-')}: the process died"):
        async with core_of(**members).watched(wait_for_ever()):
            await asyncio.Event().wait()


async def test_a_process_that_says_nothing_at_all_is_lost():
    error = WorkerError("learner-1.train_step: RuntimeError: timed out")
    core = core_of(0.01, learner_0=lambda after_s: Reference())
    assert str(await core.loss_behind(error)).startswith("learner-0: no answer within 0.01 s")


async def test_watching_ends_with_the_block():
    async with core_of(learner_0=alive, buffer=alive).watched(wait_for_ever()):
        assert len(asyncio.all_tasks()) == 1 + 3, "a watch for each, and the look beside"
    assert len(asyncio.all_tasks()) == 1


async def test_a_failure_beside_a_death_is_its_consequence():
    core = core_of(learner_0=alive, learner_1=dead, buffer=alive)
    error = WorkerError("learner-0.train_step: RuntimeError: Connection closed by peer")
    loss = await core.loss_behind(error)
    assert isinstance(loss, CoreLost)
    assert str(loss).startswith("learner-1: the process died")
    assert "Connection closed by peer" in str(loss)


async def test_a_failure_with_all_processes_there_stays_what_it_is():
    error = DivergenceError("learner-0.train_step: nan")
    core = core_of(learner_0=alive, learner_1=alive, buffer=alive)
    assert await core.loss_behind(error) is error


async def test_the_death_of_a_rank_is_told_while_the_other_is_still_at_work():
    ranks = [Actor(snapshot=Reference), Actor(snapshot=lambda: Reference().died())]
    learner = RayLearner(ranks, tiny_config(learner={"ranks": 2}))
    with pytest.raises(CoreLost, match=r"learner-1.snapshot: the process died"):
        await learner.snapshot()


async def test_a_rank_that_is_silent_past_its_deadline_is_lost():
    config = tiny_config(learner={"step_timeout_s": 0.01})
    with pytest.raises(CoreLost, match="no answer within 0.01 s"):
        await RayLearner([Actor(snapshot=Reference)], config).snapshot()


async def test_the_loss_of_a_pool_worker_is_none_of_the_core():
    with pytest.raises(WorkerDied):
        await answer(Reference().died(), 60, "generation-0.generate")  # type: ignore[arg-type]
    with pytest.raises(CoreLost):
        await core_answer(Reference().died(), 60, "buffer.take")  # type: ignore[arg-type]
    assert not issubclass(WorkerDied, CoreLost)


def pool_of(worker: Worker, retired: list[Worker]) -> WorkerPool:
    async def launch(name: str) -> Worker:
        return worker

    async def check(worker: Worker) -> None:
        return None

    limits = PoolLimits(max_restarts=0)
    return WorkerPool(
        kind="generation", launch=launch, retire=retired.append, check=check, limits=limits
    )


def engine_worker(**methods: Callable[..., Reference]) -> Worker:
    return Worker(name="generation-0", actor=Actor(**methods), placement=None)


async def test_a_worker_takes_an_earlier_version_after_a_later_one():
    pulled: list[int] = []

    def pull(version: Any) -> Reference:
        pulled.append(version.version)
        loaded = LoadedWeights(
            version=version.version,
            digest=version.digest,
            num_tensors=version.num_tensors,
            pause_s=0.0,
        )
        return Reference().answered(loaded)

    worker = engine_worker(pull=pull)
    pool = pool_of(worker, [])
    await pool.start(1)
    generation = RayGeneration(pool, tiny_config())
    await generation.pull(make_version(12))
    await generation.begin_anew()
    await generation.join(worker)
    assert pulled == [12], "a worker that joins now would ask for weights that are rewound"
    await generation.pull(make_version(8))
    await generation.join(worker)
    assert pulled == [12, 8, 8]


async def test_groups_that_were_given_up_are_cancelled_and_waited_for(monkeypatch):
    under_way = Reference()
    cancelled: list[Any] = []
    monkeypatch.setattr(ray, "cancel", cancelled.append)
    asked = asyncio.Event()

    def generate(*_: Any) -> tuple[Reference, None]:
        asked.set()
        return under_way, None

    retired: list[Worker] = []
    pool = pool_of(engine_worker(generate=generate), retired)  # type: ignore[arg-type]
    await pool.start(1)
    generation = RayGeneration(pool, tiny_config())
    sampling = Sampling(num_samples=1, temperature=1.0, max_tokens=4)
    group = asyncio.create_task(
        generation.generate(Ticket(number=3, version=0), make_prompt(), sampling)
    )
    await asked.wait()
    group.cancel()
    await asyncio.gather(group, return_exceptions=True)
    assert cancelled == [under_way]
    waiting = asyncio.create_task(generation.begin_anew())
    await asyncio.sleep(0)
    assert not waiting.done()
    under_way.answered()
    await waiting
    assert not retired
    await generation.begin_anew()


async def test_a_worker_that_does_not_let_go_of_a_group_is_replaced(monkeypatch):
    monkeypatch.setattr(ray, "cancel", lambda reference: None)
    asked = asyncio.Event()

    def generate(*_: Any) -> tuple[Reference, None]:
        asked.set()
        return Reference(), None

    retired: list[Worker] = []
    worker = engine_worker(generate=generate)  # type: ignore[arg-type]
    pool = pool_of(worker, retired)
    await pool.start(1)
    generation = RayGeneration(pool, tiny_config(cluster={"heartbeat_timeout_s": 0.01}))
    sampling = Sampling(num_samples=1, temperature=1.0, max_tokens=4)
    group = asyncio.create_task(
        generation.generate(Ticket(number=3, version=0), make_prompt(), sampling)
    )
    await asked.wait()
    group.cancel()
    await asyncio.gather(group, return_exceptions=True)
    await generation.begin_anew()
    assert retired == [worker]


@pytest.mark.parametrize("keeps", [True, False])
async def test_scoring_workers_forget_versions_where_they_keep_any(keeps: bool):
    worker = engine_worker(forget_versions=lambda: Reference().answered())
    pool = pool_of(worker, [])
    await pool.start(1)
    await RayScoring(pool, tiny_config(scoring={"exact_logprobs": keeps})).begin_anew()
    assert worker.actor.calls == ["forget_versions"] * keeps
