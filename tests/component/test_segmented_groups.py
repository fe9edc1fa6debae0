"""Groups in segments over a pool: what a dead worker costs, and where the next segment goes.

Most tests need no cluster: an actor is a worker in this process, a reference is a future.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import ObjectReconstructionFailedError, RayActorError, RayTaskError
from ray.util.state import list_actors

from actors.services.generation_client import RayGeneration
from actors.services.start_services import (
    Launcher,
    generation_pool,
)
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.records import PartialGroup, Prompt, RolloutGroup
from rlhf_cluster.run.worker_pool import (
    PoolLimits,
    State,
    Worker,
    WorkerPool,
)
from tests.support.builders.run_configs import tiny_config
from tests.support.engines.prefix_engine import (
    PROMPT,
    TICKET,
    arrays,
    sampling,
    start_worker,
    to_the_end,
)
from tests.support.engines.scripted_engine import (
    VOCABULARY,
    write_script,
    write_tokenizer,
)
from tests.support.fakes.services import make_version

SEGMENT, MAX_TOKENS = 4, 18
HOW = sampling(8, max_tokens=MAX_TOKENS, greedy_baseline=True)
Fault = Callable[[str, int], Exception | None]


def lost() -> Exception:
    cause = ObjectReconstructionFailedError("0" * 56, "", "")
    return RayTaskError("generate", "lost", cause).as_instanceof_cause()


class FakeActor:
    """`actor.generate.options(num_returns=2).remote(...)` of a worker in this process.

    `fault(worker, n)` is the error of call n (from 1) of the whole plant, raised once its answer
    was sampled, as when a process dies at the very end.
    """

    def __init__(self, worker: GenerationWorker, plant: Plant) -> None:
        self._worker, self._plant = worker, plant
        self.generate = self

    def options(self, num_returns: int) -> FakeActor:
        assert num_returns == 2
        return self

    def remote(self, *arguments: Any) -> tuple[Any, dict[str, Any]]:
        handle: dict[str, Any] = {}
        answer: Future[Any] = Future()
        *given, partial = arguments
        prefix = partial["record"] if partial else None
        self._plant.prefixes.append(prefix)
        self._plant.calls.append(self._worker._name)
        number = len(self._plant.calls)

        async def work() -> None:
            meta, handle["record"] = await self._worker.generate(*given, prefix)
            fault = self._plant.fault(self._worker._name, number)
            if fault is None:
                answer.set_result(meta)
            else:
                answer.set_exception(fault)

        self._plant.tasks.append(asyncio.ensure_future(work()))
        return Reference(answer), handle


class Reference:
    def __init__(self, result: Future[Any]) -> None:
        self._result = result

    def future(self) -> Future[Any]:
        return self._result


class Plant:
    """A pool of workers in this process, and the client that a run has of it."""

    def __init__(
        self,
        fault: Fault = lambda worker, number: None,
        segment_tokens: int | None = SEGMENT,
        **section: Any,
    ) -> None:
        self.fault, self._segment_tokens = fault, segment_tokens
        self.calls: list[str] = []
        self.prefixes: list[PartialGroup | None] = []
        self.tasks: list[asyncio.Future[None]] = []
        self.pool = WorkerPool(
            kind="generation",
            launch=self.launch,
            retire=lambda worker: None,
            check=self.check,
            limits=PoolLimits(acquire_timeout_s=20.0, backoff_s=0.0, max_restarts=100),
        )
        settings = tiny_config(generation=section).generation
        self.client = RayGeneration(self.pool, settings, settings.take_deadline_s)

    async def launch(self, name: str) -> Worker:
        worker = await start_worker(self._segment_tokens, name)
        return Worker(name=name, actor=FakeActor(worker, self), placement=None)

    async def check(self, worker: Worker) -> None: ...

    async def generate(self) -> RolloutGroup:
        handle = await self.client.generate(TICKET, PROMPT, HOW)
        return handle["record"]

    def totals(self) -> dict[str, float]:
        prefix = "generation/"
        return {k.removeprefix(prefix): v for k, v in self.client.metrics().items()}


async def started(num_workers: int, **changes: Any) -> Plant:
    plant = Plant(**changes)
    await plant.pool.start(num_workers)
    return plant


def dies_at(*numbers: int) -> Fault:
    return lambda worker, number: RayActorError() if number in numbers else None


async def test_a_group_stays_with_a_busier_worker_and_ends_as_without_a_pool():
    def burden(worker: str, number: int) -> None:
        (busy,) = [w for w in plant.pool.live if w.name == worker]
        busy.num_in_flight += 1

    plant = await started(3, fault=burden)
    group = await plant.generate()
    alone, _ = await to_the_end([await start_worker(SEGMENT)], HOW)
    assert arrays(group) == arrays(alone)
    assert len(plant.calls) == 5, "18 tokens at most, 4 at a time"
    assert len(set(plant.calls)) == 1
    totals = plant.totals()
    assert totals == {
        "segments_total": 5,
        "segments_queued_total": 0,
        "tokens_kept_total": 0,
        "tokens_resampled_total": 0,
        "retries_total": 0,
    }


async def test_whole_responses_are_one_call():
    plant = await started(2, segment_tokens=None)
    await plant.generate()
    assert plant.prefixes == [None]
    assert plant.totals()["segments_total"] == 1


async def test_a_worker_that_dies_in_the_third_segment_costs_that_segment_alone():
    undisturbed = await (await started(2)).generate()
    plant = await started(2, fault=dies_at(3))
    group = await plant.generate()
    assert plant.calls[0] == plant.calls[1] == plant.calls[2]
    assert {*plant.calls[3:]} == {plant.calls[3]} != {plant.calls[0]}, "on to another, and it stays"
    assert arrays(group) == arrays(undisturbed), "the two segments before, and the streams after"
    prefix = plant.prefixes[3]
    assert prefix is plant.prefixes[2] is not None
    assert prefix.num_unfinished >= 3, "the test needs responses that go on"
    for rollout, before in zip(group.rollouts, prefix.responses[:-1], strict=True):
        kept = len(before.response_ids)
        assert rollout.response_ids[:kept].tolist() == before.response_ids.tolist()
        assert rollout.sampled_logprobs[:kept].tolist() == before.sampled_logprobs.tolist()
        both = ", ".join([plant.calls[0], plant.calls[3]])
        assert rollout.worker == (both if before.finish_reason is None else plant.calls[0])
    third = plant.prefixes[4]
    assert third is not None
    assert plant.totals() == {
        "segments_total": 5,
        "segments_queued_total": 0,
        "tokens_kept_total": prefix.num_tokens,
        "tokens_resampled_total": third.num_tokens - prefix.num_tokens,
        "retries_total": 1,
    }
    assert plant.pool.restarts.total == 1


async def test_a_whole_response_that_is_lost_costs_all_of_it():
    plant = await started(2, segment_tokens=None, fault=dies_at(1))
    group = await plant.generate()
    num_tokens = sum(len(ids) for _, ids, *_ in arrays(group))
    totals = plant.totals()
    assert (totals["tokens_kept_total"], totals["tokens_resampled_total"]) == (0, num_tokens)


async def test_each_segment_has_retries_of_its_own_and_no_more():
    plant = await started(2, fault=dies_at(1, 3, 5, 7, 9), max_retries=1)
    await plant.generate()
    assert len(plant.calls) == 10
    plant = await started(2, fault=dies_at(1, 4, 5), max_retries=1)
    with pytest.raises(WorkerError, match=r"generate\(g00000007\): the process died"):
        await plant.generate()
    assert len(plant.calls) == 5


async def test_a_draining_worker_keeps_the_segment_under_way_and_gets_no_further_one():
    def drain_at_two(worker: str, number: int) -> None:
        if number == 2:
            (busy,) = [w for w in plant.pool.live if w.name == worker]
            busy.state = State.DRAINING

    plant = await started(2, fault=drain_at_two)
    await plant.generate()
    assert plant.calls[0] == plant.calls[1]
    assert plant.calls[0] not in plant.calls[2:]
    assert len(plant.calls) == 5
    assert plant.totals()["tokens_resampled_total"] == 0


async def test_tokens_lost_with_their_node_are_sampled_again_from_the_prompt():
    undisturbed = await (await started(2)).generate()
    plant = await started(2, fault=lambda worker, number: lost() if number == 3 else None)
    group = await plant.generate()
    assert plant.prefixes[3] is None
    assert arrays(group) == arrays(undisturbed)
    gone = plant.prefixes[2]
    assert gone is not None
    assert plant.totals()["tokens_resampled_total"] == gone.num_tokens
    assert plant.pool.restarts.total == 0, "the worker is as good as before"


async def test_tokens_that_are_lost_again_and_again_end_the_group():
    plant = await started(1, fault=lambda worker, number: lost() if number > 1 else None)
    with pytest.raises(WorkerError, match="lost with the node"):
        await plant.generate()
    assert len(plant.calls) <= 2 * (3 + 1) + 1


def _pid(worker: Worker) -> int:
    (state,) = list_actors(
        address=ray.get_runtime_context().gcs_address,
        filters=[("actor_id", "=", worker.actor._actor_id.hex())],
        detail=True,
    )
    assert state.pid
    return state.pid


async def test_a_worker_killed_in_the_middle_of_a_response_leaves_its_tokens_to_another(
    ray_address, tmp_path
):
    config = tiny_config(
        run={"root": str(tmp_path), "name": "segments"},
        generation={"workers": 2, "segment_tokens": 2},
    )
    write_tokenizer(tmp_path)
    digits = np.array([VOCABULARY[c] for c in "503917="], dtype=np.int32)
    prompt = Prompt(prompt_id="p", token_ids=digits, source="503917=")
    launcher = Launcher(
        config=config,
        model_dir=str(tmp_path),
        engine_factory="tests.support.engines.scripted_engine:make_engine",
        engine_environment={},
    )
    pool, client = generation_pool(launcher)
    try:
        await pool.start(2)
        await client.pull(make_version(1))
        undisturbed = ray.get(await client.generate(TICKET, prompt, HOW))
        victim = pool.live[0]
        write_script(tmp_path, workers={victim.name: {"hang_after_tokens": 4}})
        running = asyncio.create_task(client.generate(TICKET, prompt, HOW))
        async with asyncio.timeout(60):
            # The engine is in another process, which has no event to wait for.
            while ray.get(victim.actor.stats.remote())["engine/num_running"] == 0:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await client.pull(make_version(2))
        os.kill(_pid(victim), signal.SIGKILL)
        group = ray.get(await running)
    finally:
        pool.close()
    for rollout, before in zip(group.rollouts, undisturbed.rollouts, strict=True):
        assert rollout.versions.tolist() == [1, 1, 1, 1, 2, 2, 2]
        assert rollout.response_ids[:4].tolist() == before.response_ids[:4].tolist()
        assert np.array_equal(rollout.sampled_logprobs[:4], before.sampled_logprobs[:4])
        assert rollout.worker.split(", ")[0] == victim.name
        assert len(rollout.worker.split(", ")) == 2
    assert client.metrics() == {
        "generation/segments_total": 8,
        "generation/segments_queued_total": 0,
        "generation/tokens_kept_total": 9 * 4,
        "generation/tokens_resampled_total": 9 * 2,
        "generation/retries_total": 1,
    }
