"""Remote calls with a deadline, and errors that name the call that failed.

An event loop waits for a Ray reference with `answer`, a thread with `answer_now`. Both turn
- an `RlhfError` that the callee raised into that same error;
- any other error of the callee into `WorkerError` with its last line;
- a dead or unreachable actor into `WorkerDied`;
- an argument that was lost with the node that held it into `RecordLost`;
- a passed deadline into `WorkerSilent`.
`core_answer` is for learner ranks and the buffer: their death or silence is a `CoreLost`.
A `Client` lists the methods of an actor, each with its deadline. A `NamedActor` is found by its name,
and is called from threads; `serving` runs it.

Promises:
- a wait is longer than the time that the callee may take (`rlhf_cluster.util.waiting`), so the
  callee's error about its own deadline still arrives;
- an answer that has arrived is returned, however late the loop looks at it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from types import CoroutineType
from typing import Any, Concatenate, ParamSpec, TypeVar

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
    RunError,
    WeightError,
    WorkerDied,
    WorkerError,
    WorkerSilent,
)
from rlhf_cluster.util.waiting import reply_deadline

NAMESPACE = "rlhf_cluster"
_NAME_TIMEOUT_S = 30.0

_P = ParamSpec("_P")
_T = TypeVar("_T")


async def answer(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """Return the value of `ref`, whose callee may take `timeout_s`.

    Args:
        what: name of the call in errors, such as "generation-0.pull".
    """
    future, wait_s = ref.future(), reply_deadline(timeout_s)
    try:
        try:
            async with asyncio.timeout(wait_s):
                return await asyncio.wrap_future(future)
        except TimeoutError:
            # A delayed loop sees the answer and the timer in one turn, and the timer first.
            if not future.done() or future.cancelled():
                raise
            return future.result()
    except RayError as error:  # first: Ray's copy of a StalledError is a TimeoutError too
        raise translate(error, what) from error
    except TimeoutError as error:
        raise WorkerSilent(f"{what}: no answer within {wait_s:g} s") from error


async def core_answer(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """Return `answer` of a learner rank or the buffer, with `CoreLost` for its death or silence.

    No other process can take over from one of these.
    """
    try:
        return await answer(ref, timeout_s, what)
    except (WorkerDied, WorkerSilent) as error:
        lost = CoreLost(str(error))
        lost.process = what.partition(".")[0]
        raise lost from error


class Client:
    """Client of one actor. A subclass lists the actor's methods, each as a `remote`."""

    def __init__(self, actor: Any, name: str) -> None:
        """`name`: that of the actor in errors."""
        self.actor, self.name = actor, name


def remote(
    method: Callable[Concatenate[Any, _P], Awaitable[_T]],
    timeout_s: float,
    wait: Callable[[ray.ObjectRef, float, str], Awaitable[Any]] = core_answer,
) -> Callable[Concatenate[Any, _P], CoroutineType[Any, Any, _T]]:
    """Build the method of a `Client` that calls `method` of the actor, which may take `timeout_s`.

    `wait` waits for the reply, and decides which errors the caller sees. Ray fetches an argument that
    is a reference; one inside a record or a list is passed on.
    """

    async def call(client: Client, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        ref = getattr(client.actor, method.__name__).remote(*args, **kwargs)
        return await wait(ref, timeout_s, f"{client.name}.{method.__name__}")

    return call


def answer_now(ref: ray.ObjectRef, timeout_s: float, what: str) -> Any:
    """Return the value of `ref` like `answer`, for code without an event loop."""
    wait_s = reply_deadline(timeout_s)
    try:
        return ray.get(ref, timeout=wait_s)
    except GetTimeoutError as error:
        raise WorkerSilent(f"{what}: no answer within {wait_s:g} s") from error
    except RayError as error:
        raise translate(error, what) from error


def fetch_there(refs: Sequence[ray.ObjectRef], timeout_s: float = 60.0) -> list[Any | None]:
    """Return the values of `refs`; None for a value that was lost with its node, or is late.

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
    """Convert an error of Ray to one of this project's. `what` names the call."""
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


class NamedActor:
    """Handle of the actor `name` in another process. Calls block, so it is for threads."""

    def __init__(self, name: str, role: str) -> None:
        """`role`: relative clause for errors about the actor, such as "which lists the versions"."""
        self._name, self._role = name, role
        self._actor: Any = None

    def call(self, timeout_s: float, method: str, *arguments: Any) -> Any:
        """Call a method of the actor and return its result.

        Raises: `WeightError` if it cannot be reached, or does not answer within `timeout_s`.
        """
        try:
            if self._actor is None:
                self._actor = ray.get_actor(self._name, namespace=NAMESPACE)
            reference = getattr(self._actor, method).remote(*arguments)
            return answer_now(reference, timeout_s, f"{self._name}.{method}")
        except (WorkerError, ValueError) as error:
            self._actor = None
            raise WeightError(
                f"{self._name}, {self._role}, cannot be reached ({error}). Publish again when "
                "it is back"
            ) from error


@asynccontextmanager
async def serving(build: Callable[[], Any], name: str) -> AsyncIterator[None]:
    """Run an actor of class `build` with the name `name` for the duration of the block.

    Ray restarts an actor that died; it then has no state.

    Raises: `RunError` if the name is still taken after `_NAME_TIMEOUT_S`.
    Waits for: the name, if a run that was killed still holds it.
    """
    ends = time.monotonic() + _NAME_TIMEOUT_S
    while True:
        try:
            actor: Any = (
                ray.remote(num_cpus=0, max_restarts=-1)(build)
                .options(name=name, namespace=NAMESPACE)
                .remote()
            )
            break
        except ValueError as error:
            if time.monotonic() > ends:
                raise RunError(
                    f"actor {name} of another run of this name is still alive after "
                    f"{_NAME_TIMEOUT_S:g} s. Stop that run"
                ) from error
        await asyncio.sleep(1.0)
    try:
        yield
    finally:
        ray.kill(actor)
