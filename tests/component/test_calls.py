"""How the controller waits for a remote call. No cluster is needed: a reference is a future."""

import asyncio
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from actors.cluster.calls import Client, answer, core_answer, remote
from rlhf_cluster.errors import CoreLost, WorkerSilent


class Reference:
    def __init__(self) -> None:
        self.result: Future[str] = Future()

    def future(self) -> "Future[str]":
        return self.result


async def test_an_answer_comes_back():
    reference = Reference()
    reference.result.set_result("yes")
    assert await answer(reference, 5, "worker.ask") == "yes"


async def test_a_deadline_names_the_call():
    with pytest.raises(WorkerSilent, match="worker.ask: no answer within 0.511 s"):
        await answer(Reference(), 0.01, "worker.ask")


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancellation_that_meets_the_answer_is_not_swallowed(turns: int):
    """A watch loop that survives its cancellation would keep a finished run from ending."""
    reference = Reference()
    task = asyncio.create_task(answer(reference, 5, "worker.ask"))
    await asyncio.sleep(0)
    reference.result.set_result("yes")
    for _ in range(turns):
        await asyncio.sleep(0)
    came_first = task.done()
    task.cancel()
    if came_first:
        assert await task == "yes"
    else:
        with pytest.raises(asyncio.CancelledError):
            await task


class Clerk:
    async def file(self, number: int, *, shelf: str) -> str: ...

    async def fetch(self) -> str: ...


class RemoteClerk(Client):
    file = remote(Clerk.file, 5)


async def test_a_method_of_a_client_calls_that_of_its_actor():
    asked = []

    def call(*args, **kwargs) -> Reference:
        asked.append((args, kwargs))
        reference = Reference()
        reference.result.set_result("filed")
        return reference

    clerk = RemoteClerk(SimpleNamespace(file=SimpleNamespace(remote=call)), "clerk")
    assert await clerk.file(7, shelf="b") == "filed"
    assert asked == [((7,), {"shelf": "b"})]


@pytest.mark.parametrize(("wait", "error"), [(answer, WorkerSilent), (core_answer, CoreLost)])
async def test_each_call_of_a_client_has_its_own_deadline_and_error(wait, error):
    class Silent(Client):
        fetch = remote(Clerk.fetch, 0.01, wait)

    clerk = Silent(SimpleNamespace(fetch=SimpleNamespace(remote=Reference)), "clerk")
    with pytest.raises(error, match="clerk.fetch: no answer within 0.511 s"):
        await clerk.fetch()
