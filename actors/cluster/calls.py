"""Remote calls with a deadline and errors that name what failed.

`answer` is how an event loop of this project waits for a Ray reference, `answer_now` how a thread does.
It turns
- an error that our own code raised in the other process into that same error,
- any other error there into `WorkerError` with its last line,
- a dead or unreachable actor into `WorkerDied`,
- an argument that was lost with the node that held it into `RecordLost`,
- a passed deadline into `WorkerSilent`.

Promises: a wait takes longer than the callee may (`rlhf_cluster.util.deadlines`), so that what the
callee says of its own deadline arrives; an answer that has arrived counts, however late the loop looks
at it.

`core_answer` is the same for a learner rank or the buffer, whose death or silence is a `CoreLost`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)

from rlhf_cluster.errors import (
    CoreLost,
    RecordLost,
    RlhfError,
    WorkerDied,
    WorkerError,
    WorkerSilent,
)
from rlhf_cluster.util.deadlines import reply_deadline


async def answer(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """The value of `ref`, whose callee may take `timeout_s`. `what` names the call in errors, such as
    "generation-0.pull"."""
    future, wait_s = ref.future(), reply_deadline(timeout_s)
    try:
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            # A loop that was held up sees answer and timer at once, and the timer first.
            if not future.done() or future.cancelled():
                raise
            return future.result()
    except RayError as error:  # first: Ray's copy of a StalledError is a TimeoutError too
        raise translate(error, what) from error
    except TimeoutError as error:
        raise WorkerSilent(f"{what}: no answer within {wait_s:g} s") from error


async def core_answer(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """`answer` of a learner rank or the buffer: nobody can take over from one that is gone."""
    try:
        return await answer(ref, timeout_s, what)
    except (WorkerDied, WorkerSilent) as error:
        lost = CoreLost(str(error))
        lost.process = what.partition(".")[0]
        raise lost from error


def answer_now(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """`answer` for code without an event loop."""
    wait_s = reply_deadline(timeout_s)
    try:
        return ray.get(ref, timeout=wait_s)
    except GetTimeoutError as error:
        raise WorkerSilent(f"{what}: no answer within {wait_s:g} s") from error
    except RayError as error:
        raise translate(error, what) from error


def fetch_there(refs: Sequence[ray.ObjectRef], timeout_s: float = 60.0) -> list[Any | None]:
    """What `refs` stand for; None for what was lost with its node, or did not come in time.

    Waits for: all of them, within one deadline.
    """
    ready, _ = ray.wait(list(refs), num_returns=len(refs), timeout=timeout_s)
    there = set(ready)
    return [_get_unless_lost(ref) if ref in there else None for ref in refs]


def _get_unless_lost(ref: ray.ObjectRef) -> Any | None:
    try:
        return ray.get(ref, timeout=10)
    except (ObjectLostError, GetTimeoutError):
        return None


def translate(error: Exception, what: str) -> RlhfError:
    """One of our own errors for any error of Ray."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        if isinstance(cause, RlhfError):
            return type(cause)(f"{what}: {cause}")
        if isinstance(cause, ObjectLostError):
            return RecordLost(f"{what}: a record that it needs was lost with the node that held it")
        last = str(error).strip().splitlines()[-1]
        return WorkerError(f"{what}: {last}")
    if isinstance(error, RayActorError | NodeDiedError | OutOfMemoryError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return WorkerDied(f"{what}: the process died. {' '.join(lines[:3])}")
    return WorkerError(f"{what}: {type(error).__name__}: {error}")
