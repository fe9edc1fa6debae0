"""The driver's end of the control actor, which may die or hang like any other process.

Promises:
- the control actor never ends the run. An actor that is dead or silent is ended, and another is started
  under the same name, at most `max_restarts` times. After that the run continues without one, and
  logs it;
- a wish is answered in the actor that it was made in. Numbers begin again with a new actor, so an
  answer elsewhere could be mistaken for that of another wish. The process that asked in an actor that
  died got its error.

It decides nothing about Ray: starting, ending and asking are arguments.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cluster.errors import RlhfError, WorkerError
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.util.slow_disk import run_in_thread

PATIENCE_S = 30.0
"""Seconds that a new actor waits for the previous one to release the name."""

Ask = Callable[..., Awaitable[Any]]
"""Call of `ask(actor, method, *arguments)`, which returns the actor's answer.

It has a deadline, and raises `WorkerError`.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Request of another process for sizes of pools, number `number` of `actor`."""

    number: int
    sizes: dict[str, int]
    actor: Any


class ControlChannel:
    """Connection to the control actor `actor`. It is closed when no restarts are left."""

    def __init__(
        self,
        actor: Any,
        *,
        start: Callable[[float], Any],
        end: Callable[[Any], None],
        ask: Ask,
        max_restarts: int,
        tell: Callable[[str], None],
        restarts: RestartWindow | None = None,
    ) -> None:
        """Open the channel to `actor`.

        `start` returns another actor. It waits for the name for the given number of seconds at most,
        and may block.
        """
        self._actor = actor
        self._start, self._end, self._ask, self._tell = start, end, ask, tell
        self._max_restarts = max_restarts
        self.restarts = restarts or RestartWindow()

    @property
    def is_open(self) -> bool:
        return self._actor is not None

    async def exchange(self, status: Mapping[str, Any]) -> list[Wish]:
        """Leave `status` in the actor, and return the wishes made since the last call.

        Waits for: the actor, and if it is dead, for the start of another. Raises nothing.
        """
        actor = self._actor
        if actor is None:
            return []
        try:
            made = await self._ask(actor, "wishes")
            wishes = [Wish(number=n, sizes=sizes, actor=actor) for n, sizes in made]
        except WorkerError as error:
            await self._replace(error)
            return []
        try:
            await self._ask(actor, "set_status", dict(status))
        except WorkerError as error:  # wishes that were taken are carried out all the same
            await self._replace(error)
        return wishes

    async def answer(self, wish: Wish, results: Mapping[str, str]) -> None:
        """Leave `results` as the answer to `wish`.

        Raises nothing: the process that asked in an actor that is dead got an error.
        """
        try:
            await self._ask(wish.actor, "answer", wish.number, dict(results))
        except WorkerError as error:
            self._tell(f"nobody hears what became of scale {wish.sizes}: {error}")

    def close(self) -> None:
        if self._actor is not None:
            self._end(self._actor)
            self._actor = None

    async def _replace(self, error: RlhfError) -> None:
        """Start another actor until one runs, or the budget is used up."""
        while self._actor is not None:
            self._end(self._actor)
            if self.restarts.recent >= self._max_restarts:
                self._actor = None
                self._tell(
                    f"the control channel was lost {self.restarts.recent + 1} times within "
                    f"{self.restarts.window_s:g} s, over "
                    f"cluster.max_restarts = {self._max_restarts}: the run goes on without it, and "
                    f"cannot be scaled. Last: {error}"
                )
                return
            self.restarts.count(error)
            try:
                self._actor = await run_in_thread(self._start, PATIENCE_S)
            except RlhfError as again:
                error = again
                continue
            self._tell(
                f"{error}: another control channel is open, restart {self.restarts.recent} of "
                f"{self._max_restarts}"
            )
            return
