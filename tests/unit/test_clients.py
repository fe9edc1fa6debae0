"""How calls of a pool are tried on its workers, with actors and references that are none of Ray's."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from actors.clients import try_workers
from actors.pool import PoolLimits, Worker, WorkerPool
from rlhf_cluster.errors import (
    DataError,
    RecordError,
    ScoringError,
    StalledError,
    StoreError,
    WorkerError,
)


class Reference:
    """What a call returns: an answer, an error that the worker raised, or neither for ever."""

    def __init__(self, found: Any = None, never: bool = False) -> None:
        self._future: Future[Any] = Future()
        if isinstance(found, Exception):
            self._future.set_exception(RayTaskError("method", "its stack", found))
        elif not never:
            self._future.set_result(found)

    def future(self) -> Future[Any]:
        return self._future


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
