"""Hot spares of the learner: warm processes that wait to become ranks.

    resume -> [place, start, import, wait] for each -> hire -> the ranks are started -> resume -> ...

A spare has imported all modules that a rank needs, and is in no process group yet. After a failure all
ranks start again in processes that were in no group. A process that was in one may keep counters of a
library (DeepSpeed), or a collective that waits for a dead rank (NCCL). So each spare saves the start of
one process, and the search for its resources. A rank is

    a spare, for as many ranks as there are spares, failed ranks first
    else a new process, in free resources
    else, with learner.on_loss = "shrink", no rank

Promises:
- a spare has its own placement group. It is not a rank, and not in a process group, until it is hired;
- no spare is started between `hire` and `resume`, so that the ranks get the resources and processors;
- a spare that dies, is silent or cannot start is replaced, `learner.max_restarts` times within a window
  and after the pauses of `Restarts`. After that the run continues without it, and logs this: a spare
  never ends the run;
- missing resources for a spare are not a failure: the placement is tried again;
- no spare outlives `kept`.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from actors.cluster.calls import core_answer
from actors.cluster.launch import take_down
from actors.services.rank_actors import ACTOR_OPTIONS, NO_RANK, RankActor, build_learner_rank
from actors.services.start_services import Launcher
from rlhf_cluster.errors import CoreLost, PlacementError, RlhfError
from rlhf_cluster.planning.placement import spare_bundle
from rlhf_cluster.run.restarts import Restarts, RestartWindow

log = logging.getLogger(__name__)

S = TypeVar("S")

_RANK = re.compile(r"learner-(\d+)")
LOOK_S = 1.0
"""Time after which a spare answers that it is alive; `hire` may wait as long."""
ROOM_AGAIN_S = 10.0
"""Seconds between a placement that failed for lack of resources and the next try."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Spare:
    """One spare process. `where` describes it, such as "process 77 on 10.0.0.1"."""

    name: str
    actor: Any
    placement: Any
    where: str

    def __str__(self) -> str:
        return f"{self.name} ({self.where})"


class Spares:
    """All hot spares of a run. All methods run on one event loop.

    Args:
        wanted: number of spares, may be 0.
        start: starts the spare with this number, or fails and leaves nothing behind.
        present: returns after this number of seconds, or raises an error if the spare is dead.
        end: kills a spare.
    """

    def __init__(
        self,
        wanted: int,
        start: Callable[[int], Awaitable[Spare]],
        present: Callable[[Spare, float], Awaitable[None]],
        end: Callable[[Spare], None],
        restarts: Restarts,
        tell: Callable[[str], None],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._wanted = wanted
        self._start, self._present, self._end = start, present, end
        self._restarts, self._tell, self._sleep = restarts, tell, sleep
        self._numbers = count()
        self._ready: list[Spare] = []
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_ready(self) -> int:
        """Number of spares that wait to be hired."""
        return len(self._ready)

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Allow spares inside the block, and end all of them after it."""
        try:
            yield
        finally:
            await self._pause()
            while self._ready:
                self._end(self._ready.pop())

    def resume(self) -> None:
        """Begin to keep the wanted number of spares ready; does nothing if this is so already."""
        if self._tasks:
            return
        held: list[Spare | None] = [*self._ready]
        held += [None] * (self._wanted - len(held))
        self._tasks = [asyncio.create_task(self._keep(spare)) for spare in held]

    async def hire(self, most: int) -> list[Spare]:
        """Return at most `most` spares that are ready and answer.

        The caller owns them from then on, and may give them back. The others stay.

        Waits for: starts in progress to be cancelled, then an answer of each spare within its deadline.
        """
        await self._pause()
        answers = await asyncio.gather(
            *(self._present(spare, 0.0) for spare in self._ready), return_exceptions=True
        )
        for spare, found in zip(tuple(self._ready), answers, strict=True):
            if found is not None:
                self._ready.remove(spare)
                self._end(spare)
                self._tell(f"a hot spare was no help: {found}")
        hired, self._ready = self._ready[:most], self._ready[most:]
        return hired

    def give_back(self, spares: list[Spare]) -> None:
        """Take back hired spares that were not needed."""
        self._ready = [*spares, *self._ready]

    async def _pause(self) -> None:
        """Cancel the starts in progress, and the watching of ready spares.

        Waits for: the removal of actors and placement groups of these starts.
        """
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, Exception):
                log.error("keeping a hot spare failed", exc_info=found)

    async def _keep(self, spare: Spare | None) -> None:
        """Keep one spare ready: start it, watch it, and replace it when it fails.

        Ends by cancellation, or when no restart is left.

        Waits for: resources, a start, and the end of the process.
        """
        told_no_room = False
        while True:
            try:
                if spare is None:
                    spare = await self._start(next(self._numbers))
                    self._ready.append(spare)
                    self._tell(f"hot spare {spare} of the learner is ready")
                while True:
                    await self._present(spare, LOOK_S)
            except PlacementError as error:
                if not told_no_room:
                    self._tell(f"a hot spare of the learner waits for room: {error}")
                told_no_room = True
                await self._sleep(ROOM_AGAIN_S)
                continue
            except RlhfError as error:
                lost = error
            told_no_room = False
            if spare is not None:
                self._ready.remove(spare)
                self._end(spare)
                spare = None
            try:
                pause_s = self._restarts.spend(lost)
            except CoreLost as error:
                self._tell(f"the run continues with {self.num_ready} hot spares: {error}")
                return
            used, limit = self._restarts.used, self._restarts.limit
            self._tell(f"{lost}: another hot spare is started, {used} of {limit}")
            await self._sleep(pause_s)


def learner_spares(launcher: Launcher, tell: Callable[[str], None]) -> Spares:
    """Build the spares of `learner.spares`, none of which is started yet."""
    config = launcher.config

    async def start(number: int) -> Spare:
        bundle = spare_bundle(config, number)
        actor, group = await launcher.actor(
            RankActor,
            [config, launcher.model_dir, NO_RANK, build_learner_rank],
            bundle,
            **ACTOR_OPTIONS,
        )
        try:
            timeout_s = config.run.start_timeout_s
            where = await core_answer(actor.warm.remote(), timeout_s, f"{bundle.owner}.warm")
        except BaseException:
            take_down(actor, group)
            raise
        return Spare(name=bundle.owner, actor=actor, placement=group, where=where)

    async def present(spare: Spare, after_s: float) -> None:
        silence_s = after_s + config.cluster.heartbeat_timeout_s
        await core_answer(spare.actor.present.remote(after_s), silence_s, spare.name)

    return Spares(
        wanted=config.learner.spares,
        start=start,
        present=present,
        end=lambda spare: take_down(spare.actor, spare.placement),
        restarts=Restarts(
            limit=config.learner.max_restarts,
            what="hot spares of the learner",
            window=RestartWindow(config.cluster.restart_window_s),
        ),
        tell=tell,
    )


def rank_of(process: str) -> frozenset[int]:
    """Return the rank in the name of a process, such as "learner-1"; empty for other names."""
    found = _RANK.fullmatch(process)
    return frozenset() if found is None else frozenset({int(found[1])})


def seats(num_ranks: int, lost: Collection[int], spares: Sequence[S]) -> tuple[S | None, ...]:
    """Assign spares to ranks. Returns the spare of each of `num_ranks` ranks, None for a new process.

    Spares are assigned in their order, at most one rank each: first to `lost` ranks, then to the lowest
    ranks. A `lost` rank that a smaller group does not have gets none.
    """
    first = sorted(rank for rank in set(lost) if 0 <= rank < num_ranks)
    order = [*first, *(rank for rank in range(num_ranks) if rank not in set(first))]
    taken = dict(zip(order, spares, strict=False))
    return tuple(taken.get(rank) for rank in range(num_ranks))


def describe_seats(taken: Sequence[object | None], lost: Collection[int]) -> str:
    """Describe an assignment of `seats`, `taken`, in one line of text."""
    parts = [
        f"rank {rank}{' (lost)' if rank in lost else ''} is {spare}"
        for rank, spare in enumerate(taken)
        if spare is not None
    ]
    new = [rank for rank, spare in enumerate(taken) if spare is None]
    if new:
        parts.append(
            f"{'ranks' if len(new) > 1 else 'rank'} {', '.join(map(str, new))} a new process"
        )
    return f"learner ranks from hot spares: {'; '.join(parts)}"
