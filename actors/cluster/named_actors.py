"""Small actors of a run that every process finds by name, and the handle that calls them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import ray

from actors.cluster.calls import answer_now
from rlhf_cluster.errors import RunError, WeightError, WorkerError

_NAME_TIMEOUT_S = 30.0


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


NAMESPACE = "rlhf_cluster"
