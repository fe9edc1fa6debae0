"""The core of a run: the learner ranks and the buffer, which live and die together.

Between them they hold one cut of the run, and nobody can take over from one that is gone. So when one
is lost all are ended, and a new core is started from a checkpoint (`rlhf_cluster.run.restarts`).

Promises:
- a process that dies is noticed at once, whether or not a call to it is under way; one that does not
  answer for `cluster.heartbeat_timeout_s` counts as lost, as in the pools;
- a failure beside a loss is taken for its consequence: the `CoreLost` names who is gone;
- a rank that lives and failed in a way that may pass (`RankFailed`) counts as lost too;
- ranks are hot spares first, then new processes; a core that may shrink starts with those and the ranks
  that there is room for, when it is not for all of them;
- nothing outlives `take_down`: ranks that wait in a collective for a dead one are killed too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.placement_group import remove_placement_group

from actors.cluster.calls import core_answer
from actors.cluster.launch import (
    place,
    spawn,
    take_down,
)
from actors.services.buffer_actor import (
    BufferActor,
    RayBuffer,
)
from actors.services.hot_spare_actors import (
    Spare,
    Spares,
)
from actors.services.learner_actors import (
    LearnerActor,
    RayLearner,
)
from actors.services.rank_actors import ACTOR_OPTIONS
from actors.services.start_services import Launcher
from rlhf_cluster.errors import CoreLost, PlacementError, RankFailed, RlhfError, first_failure
from rlhf_cluster.learner.hot_spares import (
    seats,
    told,
)
from rlhf_cluster.planning.placement import Bundle, buffer_bundle, fewer_ranks, rank_bundles
from rlhf_cluster.records import BufferState

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""How long a process takes for an answer that only says that it is there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process. `actor` has a method `present`, answered whatever else it does."""

    name: str
    actor: Any
    placement: Any


class Core:
    """Start it once; `take_down` ends it, whatever it came to.

    `num_ranks` is how many ranks it has, 0 before the start. `place_bundles` is replaced by tests.
    """

    def __init__(
        self,
        launcher: Launcher,
        may_shrink: bool = False,
        tell: Callable[[str], None] = log.info,
        place_bundles: Callable[..., Awaitable[Any]] = place,
        spares: Spares | None = None,
        lost: Collection[int] = (),
    ) -> None:
        """`lost` are the ranks that the core before this one lost."""
        self._launcher = launcher
        self._may_shrink, self._tell, self._place = may_shrink, tell, place_bundles
        self._spares, self._lost = spares, lost
        self._silence_s = launcher.config.cluster.heartbeat_timeout_s
        self.members: list[Member] = []
        self.num_ranks = 0

    async def start(
        self,
        state: BufferState | None,
        prepare: Callable[[RayLearner], Awaitable[None]],
    ) -> tuple[RayLearner, RayBuffer]:
        """Buffer and learner, side by side, ready to work: `state` is that of a checkpoint, and
        `prepare` gives a new learner its weights. Raises the first failure."""
        try:
            async with asyncio.TaskGroup() as starts:
                learner = starts.create_task(self._start_learner(prepare))
                buffer = starts.create_task(self._start_buffer(state))
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures
        return learner.result(), buffer.result()

    @asynccontextmanager
    async def watched(self, look: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """A member that is lost cancels the block, and is raised as `CoreLost`. `look` runs beside
        the block, until it ends."""
        try:
            async with asyncio.TaskGroup() as watches:
                tasks = [watches.create_task(self._watch(member)) for member in self.members]
                tasks.append(watches.create_task(look))
                yield
                for task in tasks:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures

    async def loss_behind(self, error: RlhfError) -> RlhfError:
        """`error` itself, or the `CoreLost` that it follows from, or that it is.

        Waits for: an answer of every member, at most `cluster.heartbeat_timeout_s`.
        """
        if isinstance(error, CoreLost):
            return error
        looks = (self._look(member, 0.0) for member in self.members)
        found = await asyncio.gather(*looks, return_exceptions=True)
        lost = next((each for each in found if isinstance(each, CoreLost)), None)
        if lost is not None:
            behind = CoreLost(f"{lost}. Noticed by: {error}")
            behind.process = lost.process
            return behind
        return CoreLost(str(error)) if isinstance(error, RankFailed) else error

    def take_down(self) -> None:
        for member in self.members:
            take_down(member.actor, member.placement)
        self.members.clear()

    async def _watch(self, member: Member) -> None:
        """Waits for: the end of the process. Ends by cancellation, or with `CoreLost`."""
        while True:
            await self._look(member, LOOK_S)

    async def _look(self, member: Member, after_s: float) -> None:
        asked = member.actor.present.remote(after_s)
        await core_answer(asked, after_s + self._silence_s, member.name)

    async def _start_buffer(self, state: BufferState | None) -> RayBuffer:
        config = self._launcher.config
        bundle = buffer_bundle(config)
        actor, group = await self._launcher.actor(BufferActor, [config, state], bundle)
        self.members.append(Member(name="buffer", actor=actor, placement=group))
        await core_answer(actor.stats.remote(), config.run.start_timeout_s, "buffer.stats")
        return RayBuffer(actor)

    async def room_to_grow(self) -> bool:
        """Whether the cluster can hold the ranks that are missing, now or once it has grown.

        Waits for: that room, at most the larger of `cluster.placement_timeout_s` and
        `cluster.node_timeout_s`. What is reserved is given back.
        """
        waiting = 0 if self._spares is None else self._spares.num_ready
        missing = rank_bundles(self._launcher.config)[self.num_ranks + waiting :]
        if not missing:
            return True
        try:
            group = await self._reserve(missing)
        except RlhfError:
            return False
        remove_placement_group(group)
        return True

    async def _reserve(self, bundles: Sequence[Bundle]) -> Any:
        """Raises `PlacementError`."""
        config = self._launcher.config
        name = self._launcher.placement_name("learner")
        return await self._place(bundles, name, config.cluster.room_timeout_s)

    async def place_ranks(
        self, free: Callable[[], Mapping[str, float]], num_spares: int = 0
    ) -> tuple[int, Any]:
        """How many ranks there are, and where: a placement group of a bundle for each that is not one
        of `num_spares` spares, which have places; None where all are.

        `free` gives what is free in the cluster. Raises `PlacementError`.
        """
        section = self._launcher.config.learner
        bundles = rank_bundles(self._launcher.config)[num_spares:]
        if not bundles:
            return num_spares, None
        try:
            return num_spares + len(bundles), await self._reserve(bundles)
        except PlacementError as error:
            if not self._may_shrink:
                raise
            no_room = error
        for new in fewer_ranks(bundles, max(0, section.min_ranks - num_spares), free()):
            if num_spares + new == 0:
                break
            try:
                group = await self._reserve(bundles[:new]) if new else None
            except PlacementError:
                continue
            self._tell(
                f"goes on with {num_spares + new} of {section.ranks} learner ranks: {no_room}"
            )
            return num_spares + new, group
        raise PlacementError(
            f"{no_room}. Nor is there for fewer, down to learner.min_ranks = {section.min_ranks}"
        ) from no_room

    async def _start_learner(self, prepare: Callable[[RayLearner], Awaitable[None]]) -> RayLearner:
        """All ranks that are no spares in one placement group, a bundle each."""
        asked = self._launcher.config
        hired = await self._spares.hire(asked.learner.ranks) if self._spares else []
        try:
            ranks, group = await self.place_ranks(ray.available_resources, len(hired))
        except BaseException:
            if self._spares is not None:
                self._spares.give_back(hired)
            raise
        taken = seats(ranks, self._lost, hired)
        if hired:
            self._tell(told(taken, self._lost))
        config = asked.model_copy(
            update={"learner": asked.learner.model_copy(update={"ranks": ranks})}
        )
        actors = self.spawn_ranks(LearnerActor, config, group, spares=taken)
        learner = RayLearner(actors, config)
        await learner.setup()
        await prepare(learner)
        return learner

    def spawn_ranks(
        self,
        kind: type,
        config: Any,
        group: Any,
        *further: Any,
        spares: Sequence[Spare | None] = (),
    ) -> list[Any]:
        """The actors of all ranks: its spare, where a rank has one, else a new one, built as
        `kind(config, model folder, rank, *further)` in a bundle of `group`."""
        actors, num_new = [], 0
        for rank, bundle in enumerate(rank_bundles(config)):
            spare = spares[rank] if spares else None
            if spare is not None:
                actor, placement = spare.actor, spare.placement
                actor.enlist.remote(config, rank)
            else:
                actor, placement = (
                    spawn(
                        kind,
                        [config, self._launcher.model_dir, rank, *further],
                        bundle=bundle,
                        group=group,
                        index=num_new,
                        environment={},
                        options=ACTOR_OPTIONS,
                    ),
                    group,
                )
                num_new += 1
            actors.append(actor)
            self.members.append(Member(name=bundle.owner, actor=actor, placement=placement))
        self.num_ranks = len(actors)
        return actors
