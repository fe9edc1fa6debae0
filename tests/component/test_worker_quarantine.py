"""What the driver makes of a worker that fails again and again, or is slow. No cluster is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray.exceptions import RayError

from actors.services.generation_client import RayGeneration
from rlhf_cluster.records import Sampling, Ticket
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    Worker,
    WorkerPool,
)
from tests.support.builders.run_configs import tiny_config
from tests.support.fakes.ray_references import (
    Actor,
    Reference,
)
from tests.support.fakes.services import make_prompt


async def served_by(summary: Callable[[str], Any], num_groups: int, **rules: Any) -> WorkerPool:
    """A pool of two after so many groups one after the other; `summary` is of a worker's name."""

    def start(name: str) -> Worker:
        def generate(*_: Any) -> tuple[Reference, None]:
            found = summary(name)
            reference = Reference()
            if isinstance(found, Exception):
                reference.result.set_exception(found)
                return reference, None
            return reference.answered({"num_unfinished": 0, "queued": False, **found}), None

        return Worker(name=name, actor=Actor(generate=generate), placement=None)  # type: ignore[arg-type]

    async def launch(name: str) -> Worker:
        return start(name)

    async def check(worker: Worker) -> None:
        return None

    pool = WorkerPool(
        kind="generation",
        launch=launch,
        retire=lambda worker: None,
        check=check,
        limits=PoolLimits(),
    )
    await pool.start(2)
    section = tiny_config(generation={"quarantine": rules}).generation
    generation = RayGeneration(pool, section, section.take_deadline_s)
    sampling = Sampling(num_samples=1, temperature=1.0, max_tokens=4)
    for number in range(num_groups):
        pool.live[0].num_in_flight += number % 2  # every other group begins on the other one
        await generation.generate(Ticket(number=number, version=0), make_prompt(), sampling)
        for worker in pool.live:
            worker.num_in_flight = 0
    return pool


async def test_a_worker_that_is_far_slower_than_the_others_is_drained_and_replaced():
    def summary(name: str) -> Any:
        return {"num_tokens": 10, "generate_s": 30.0 if name == "generation-1" else 1.0}

    pool = await served_by(summary, 10, straggler_groups=3)
    assert pool.num_quarantined == 1
    assert "generation-1: quarantined: it took 3e+03 ms a token" in pool.describe_errors()
    assert "generation-1" not in [worker.name for worker in pool.live]


async def test_workers_that_are_alike_stay():
    pool = await served_by(lambda name: {"num_tokens": 10, "generate_s": 30.0}, 20)
    assert (pool.num_quarantined, pool.restarts.total) == (0, 0)


async def test_a_worker_whose_engine_fails_again_and_again_is_drained_though_it_is_healthy():
    def summary(name: str) -> Any:
        bad = name == "generation-1"
        return RayError("CUDA") if bad else {"num_tokens": 10, "generate_s": 1.0}

    pool = await served_by(summary, 10, max_faults=3)
    assert pool.num_quarantined == 1
    assert "generation-1: quarantined: 3 groups failed on it" in pool.describe_errors()


async def test_a_group_that_failed_on_a_worker_goes_to_another_though_that_one_is_idle():
    """Who fails at once is always idle: no group may come back to it for all of its tries."""
    failed: list[str] = []

    def summary(name: str) -> Any:
        if name == "generation-1":
            failed.append(name)
            return RayError("CUDA")
        return {"num_tokens": 10, "generate_s": 1.0}

    await served_by(summary, 10, max_faults=0)
    assert len(failed) == 5, "once for each group that began there"
