"""How the controller waits for a remote call. No cluster is needed: a reference is a future."""

import asyncio
from concurrent.futures import Future

import pytest

from actors.cluster.calls import answer
from rlhf_cluster.errors import WorkerSilent


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
