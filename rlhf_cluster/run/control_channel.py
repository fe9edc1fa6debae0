"""The driver's end of the control actor, which may die or hang like any other process.

Promises:
- the run never ends by it: an actor that is gone, or silent, is ended and another started under the
  same name, at most `max_restarts` times; after that the run goes on without one, and says so;
- a wish is answered in the actor that it was made in: numbers begin again with a new actor, so that an
  answer elsewhere could pass for that of another wish. Who asked in one that died got its error.

It decides nothing about Ray: starting, ending and asking are arguments.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_cluster.errors import RlhfError, WorkerError
from rlhf_cluster.run.restarts import RestartWindow
from rlhf_cluster.util.slow_disk import aside

PATIENCE_S = 30.0
"""How long a new actor waits for the name of the one before."""

Ask = Callable[..., Awaitable[Any]]
"""ask(actor, method, *arguments): its answer. Raises `WorkerError`; has a deadline of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """Sizes of pools that another process asked for, as number `number` of `actor`."""

    number: int
    sizes: dict[str, int]
    actor: Any


class ControlChannel:
    """`actor` is one that was started; None once there is none any more."""

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
        """`start` gives another actor, and waits for the name so many seconds; it may block."""
        self._actor = actor
        self._start, self._end, self._ask, self._tell = start, end, ask, tell
        self._max_restarts = max_restarts
        self.restarts = restarts or RestartWindow()

    @property
    def is_open(self) -> bool:
        return self._actor is not None

    async def exchange(self, status: Mapping[str, Any]) -> list[Wish]:
        """Leave `status`, and take the wishes made since the last time.

        Waits for: the actor, and where it is gone for the start of another. Raises nothing.
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
        """Raises nothing: who asked in an actor that is gone knows it."""
        try:
            await self._ask(wish.actor, "answer", wish.number, dict(results))
        except WorkerError as error:
            self._tell(f"nobody hears what became of scale {wish.sizes}: {error}")

    def close(self) -> None:
        if self._actor is not None:
            self._end(self._actor)
            self._actor = None

    async def _replace(self, error: RlhfError) -> None:
        """Start another until one is there, or the budget is used up."""
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
                self._actor = await aside(self._start, PATIENCE_S)
            except RlhfError as again:
                error = again
                continue
            self._tell(
                f"{error}: another control channel is open, restart {self.restarts.recent} of "
                f"{self._max_restarts}"
            )
            return
