"""Core of a run: the learner ranks and the buffer, which are started and ended together.

The learner ranks and the buffer together hold one consistent snapshot of the run, so a failed process
cannot be replaced alone. If one fails, all are ended, and a new core is started from a checkpoint
(`rlhf_cluster.run.restarts`).

Promises:
- a dead process is noticed at once, with or without a call to it in flight. A process that does not
  answer for `cluster.heartbeat_timeout_s` is treated as dead, like in the pools;
- an error that occurs together with a dead process is treated as its consequence: the `CoreLost` names
  the dead process;
- a live rank with an error that another attempt may not see (`RankFailed`) is treated as dead too;
- ranks are hot spares first, then new processes. If the cluster cannot place all ranks, a core that may
  shrink starts with the spares and the ranks that it can place;
- nothing outlives `take_down`: ranks that wait in a collective for a dead one are killed too.
"""

from __future__ import annotations

import asyncio
import functools
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
    describe_seats,
    seats,
)
from actors.services.rank_actors import (
    ACTOR_OPTIONS,
    BuildRank,
    RankActor,
    RayLearner,
    RayStage,
    build_learner_rank,
    build_stage_rank,
)
from actors.services.start_services import Launcher
from rlhf_cluster.config import RunConfig, StageConfig
from rlhf_cluster.errors import CoreLost, PlacementError, RankFailed, RlhfError, first_failure
from rlhf_cluster.planning.placement import (
    Bundle,
    buffer_bundle,
    fewer_ranks,
    rank_bundles,
    total_resources,
)
from rlhf_cluster.records import BufferState
from rlhf_cluster.run.restarts import Restarts, RestartWindow

log = logging.getLogger(__name__)

LOOK_S = 5.0
"""Seconds after which a process answers that it is alive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Member:
    """One process of the core. It answers the method `present` of `actor` whatever else it does."""

    name: str
    actor: Any
    placement: Any


def core_restarts(config: RunConfig | StageConfig) -> Restarts:
    """Return the budget of restarts of the learner ranks and, in a run, of the buffer."""
    bundles = rank_bundles(config)
    if isinstance(config, RunConfig):
        bundles.append(buffer_bundle(config))
    return Restarts(
        limit=config.learner.max_restarts,
        needs=total_resources(bundles),
        recovery_timeout_s=config.cluster.recovery_timeout_s,
        window=RestartWindow(config.cluster.restart_window_s),
    )


class Core:
    """Learner ranks and buffer of one attempt. It is started once, and ended by `take_down`.

    `num_ranks` is its number of ranks, 0 before the start. Tests replace `place_bundles`.
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
        """`lost`: numbers of the ranks that failed in the previous core."""
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
        """Start learner and buffer concurrently, and return both, ready to work.

        Args:
            state: the buffer's state of a checkpoint, if there is one.
            prepare: sets the weights of a new learner.
        Raises: the first failure.
        """
        try:
            async with asyncio.TaskGroup() as starts:
                learner = starts.create_task(self._start_learner(prepare))
                buffer = starts.create_task(self._start_buffer(state))
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures
        return learner.result(), buffer.result()

    async def start_stage(self, num_steps: int) -> RayStage:
        """Start the ranks of an offline stage, which has no buffer and no hot spares."""
        config = self._launcher.config
        _, group = await self.place_ranks(ray.available_resources)
        build = functools.partial(build_stage_rank, num_steps=num_steps)
        stage = RayStage(self.spawn_ranks(build, config, group), config)
        await stage.setup()
        return stage

    @asynccontextmanager
    async def watched(self, look: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
        """Cancel the block and raise `CoreLost` if a member dies or is silent.

        `look` runs concurrently with the block, until the block ends.
        """
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
        """Return the `CoreLost` that caused `error`, or `error` if no member failed.

        A `RankFailed` becomes a `CoreLost`.

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
        """Poll a member until it fails. Ends by cancellation, or with `CoreLost`.

        Waits for: the end of the process.
        """
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
        """Return whether the cluster can place the missing ranks, possibly after it has grown.

        The resources are reserved for the check, then given back.

        Waits for: these resources, at most the larger of `cluster.placement_timeout_s` and
        `cluster.node_timeout_s`.
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
        """Reserve `bundles` of the learner in one placement group. Raises `PlacementError`."""
        config = self._launcher.config
        name = self._launcher.placement_name("learner")
        return await self._place(bundles, name, config.cluster.room_timeout_s)

    async def place_ranks(
        self, free: Callable[[], Mapping[str, float]], num_spares: int = 0
    ) -> tuple[int, Any]:
        """Reserve resources for the ranks. Returns the number of ranks and a placement group.

        The group has one bundle for each rank that is not one of `num_spares` spares, which have their
        own. It is None if all ranks are spares.

        Args:
            free: returns the free resources of the cluster.
        Raises: `PlacementError`.
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
                f"continues with {num_spares + new} of {section.ranks} learner ranks: {no_room}"
            )
            return num_spares + new, group
        raise PlacementError(
            f"{no_room}. Fewer cannot be placed either, down to learner.min_ranks = {section.min_ranks}"
        ) from no_room

    async def _start_learner(self, prepare: Callable[[RayLearner], Awaitable[None]]) -> RayLearner:
        """Start all ranks: hired spares, and new processes in one placement group.

        If the ranks cannot be placed, the spares are given back.
        """
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
            self._tell(describe_seats(taken, self._lost))
        config = asked.model_copy(
            update={"learner": asked.learner.model_copy(update={"ranks": ranks})}
        )
        actors = self.spawn_ranks(build_learner_rank, config, group, taken)
        learner = RayLearner(actors, config)
        await learner.setup()
        await prepare(learner)
        return learner

    def spawn_ranks(
        self,
        build: BuildRank,
        config: Any,
        group: Any,
        spares: Sequence[Spare | None] = (),
    ) -> list[Any]:
        """Return the actors of all ranks, and register them as members.

        The actor of a rank is its spare, if it has one. Otherwise a new actor is started in a bundle
        of `group`, and builds its rank with `build`.
        """
        actors, num_new = [], 0
        for rank, bundle in enumerate(rank_bundles(config)):
            spare = spares[rank] if spares else None
            if spare is not None:
                actor, placement = spare.actor, spare.placement
                actor.enlist.remote(config, rank)
            else:
                actor, placement = (
                    spawn(
                        RankActor,
                        [config, self._launcher.model_dir, rank, build],
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
