"""How the driver notices that a learner rank or the buffer is gone, and what it asks of the pools then.

No cluster is needed: a reference is a future.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from actors.cluster.calls import (
    answer,
    core_answer,
)
from actors.services.generation_client import RayGeneration
from actors.services.learner_core import (
    Core,
    Member,
)
from actors.services.rank_actors import (
    RankActor,
    RayLearner,
    build_learner_rank,
)
from actors.services.scoring_client import RayScoring
from actors.services.start_services import Launcher
from rlhf_cluster.errors import (
    CoreLost,
    DivergenceError,
    RankFailed,
    WorkerDied,
    WorkerError,
)
from rlhf_cluster.generation.engine import LoadedWeights
from rlhf_cluster.records import Sampling, Ticket
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from rlhf_cluster.weights.writer_fence import Writer
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.ray_references import (
    Actor,
    Reference,
)
from tests.support.fakes.services import (
    make_prompt,
    make_version,
)

WRITER = Writer(1, "of the test")


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


def generation_over(pool: WorkerPool, **settings: Any) -> RayGeneration:
    section = tiny_config(generation=settings).generation
    return RayGeneration(pool, section, section.take_deadline_s)


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
    assert str(await core.loss_behind(error)).startswith("learner-0: no answer within 0.511 s")


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


async def test_an_error_of_a_living_rank_that_may_pass_is_a_loss_with_its_words():
    core = core_of(learner_0=alive, learner_1=alive, buffer=alive)
    error = RankFailed("learner-0.train_step: RuntimeError: Timed out waiting 60000ms for recv")
    loss = await core.loss_behind(error)
    assert type(loss) is CoreLost
    assert str(loss) == str(error)


async def test_what_a_rank_said_of_its_error_is_what_the_driver_hears():
    said = RankFailed("RuntimeError: Timed out waiting 60000ms for recv")
    reference = Reference()
    reference.result.set_exception(RayTaskError("train_step", "its traceback", said))
    with pytest.raises(RankFailed, match=r"^learner-0.train_step: RuntimeError: Timed out"):
        await core_answer(reference, 60, "learner-0.train_step")  # type: ignore[arg-type]


async def test_an_error_of_a_living_rank_beside_a_death_is_its_consequence():
    core = core_of(learner_0=alive, learner_1=dead, buffer=alive)
    loss = await core.loss_behind(RankFailed("learner-0.train_step: RuntimeError: closed by peer"))
    assert str(loss).startswith("learner-1: the process died")
    assert "closed by peer" in str(loss)


def test_every_call_of_a_rank_tells_what_may_pass_from_what_comes_again(tmp_path):
    """The actor's own methods, without a process."""
    rank = RankActor(tiny_config(run={"root": str(tmp_path)}), "", 0, build_learner_rank)
    failing = FailingRank()
    rank._rank = rank._transport = failing  # type: ignore[assignment]
    calls: list[Callable[[], Any]] = [
        lambda: rank.run("sft_step", []),
        lambda: rank.train_step([]),
        lambda: rank.run("snapshot"),
        lambda: rank.write_snapshot(None, WRITER, 60.0),
        lambda: rank.commit(3, [], WRITER, 60.0),
        lambda: rank.run("copy_state"),
        lambda: rank.write_state("", 60.0),
        lambda: rank.load_state("", None),  # type: ignore[arg-type]
    ]
    for call in calls:
        failing.error = RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer")
        with pytest.raises(RankFailed, match=r"^RuntimeError: \[gloo.*closed by peer$"):
            call()
        failing.error = DivergenceError("nan")
        with pytest.raises(DivergenceError, match="^nan$"):
            call()


class FailingRank:
    """Everything that is asked of it fails."""

    error: Exception = RuntimeError()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any, **__: Any) -> Any:
            raise self.error

        return fail


async def test_the_death_of_a_rank_is_told_while_the_other_is_still_at_work():
    ranks = [Actor(run=lambda _: Reference()), Actor(run=lambda _: Reference().died())]
    learner = RayLearner(ranks, tiny_config(learner={"ranks": 2}))
    with pytest.raises(CoreLost, match=r"learner-1.snapshot: the process died"):
        await learner.snapshot()


async def test_a_rank_that_is_silent_past_its_deadline_is_lost():
    config = tiny_config(learner={"step_timeout_s": 0.01})
    with pytest.raises(CoreLost, match="no answer within 0.522 s"):
        await RayLearner([Actor(run=lambda _: Reference())], config).snapshot()


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
    generation = generation_over(pool)
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
    generation = generation_over(pool)
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
    generation = generation_over(pool, request_timeout_s=0.01)
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
    await RayScoring({"scoring": pool}, tiny_config(scoring={"exact_logprobs": keeps})).begin_anew()
    assert worker.actor.calls == ["forget_versions"] * keeps
