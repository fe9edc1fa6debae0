"""Training with one learner and one buffer, from their current state to the end of the run.

    restore -> a version live -> evaluate -> pipeline -> evaluate

An attempt begins at step 0, or at a checkpoint, whose weights are then published again. After a failure
of an earlier learner, everything that it wrote beyond the checkpoint is deleted first, from the records
and from the weight store.
"""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from actors.drivers.checkpoint_cut import Cutter
from actors.drivers.driver import Stopped, stopped_text
from actors.drivers.rl_observer import RunObserver
from actors.services.buffer_actor import RayBuffer
from actors.services.generation_client import RayGeneration
from actors.services.rank_actors import RayLearner
from actors.services.scoring_client import RayScoring
from actors.weights.transports import Transport
from rlhf_cluster.buffer.adaptive_depth import DepthController, depth_controller
from rlhf_cluster.buffer.buffer import trim_to_bound
from rlhf_cluster.buffer.group_recovery import patience_of, recovery_of
from rlhf_cluster.buffer.staleness import build_gate
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import CoreLost, StalledError
from rlhf_cluster.evaluation.beside_training import CANCEL_S, BesideTraining
from rlhf_cluster.evaluation.evaluate import Evaluation, evaluate
from rlhf_cluster.pipeline import Pipeline
from rlhf_cluster.planning.run_inputs import Inputs
from rlhf_cluster.records import BufferState, Sampling, Ticket, WeightVersion
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.restarts import RoomAgain
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.slow_disk import DiskDeadline, run_in_thread
from rlhf_cluster.util.waiting import reply_deadline
from rlhf_cluster.weights import store
from rlhf_cluster.weights.sync import WeightSync, live_deadline_s
from rlhf_cluster.weights.writer_fence import LOCK_TIMEOUT_S, Writer

LOOK_EVERY_S = 1.0
T = TypeVar("T")


def publish_deadline_s(config: RunConfig, num_bytes: int) -> float:
    """Return the most seconds until a version of `num_bytes` is live, over all `WeightSync` tries.

    The workers may keep the version before it for an evaluation meanwhile.
    """
    held_s = config.evaluation.hold_s + CANCEL_S
    return held_s + live_deadline_s(
        snapshot_s=2 * config.learner.step_timeout_s,
        publish_s=config.weights.publish_timeout_s,
        heartbeat_s=config.cluster.heartbeat_timeout_s,
        pull_s=config.pull_deadline_s(num_bytes),
        reference_s=config.run.start_timeout_s if config.stored_reference else None,
        exact_s=config.pull_deadline_s(num_bytes) if config.scoring.exact_logprobs else None,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Context of a run that outlives failures of learner and buffer."""

    config: RunConfig
    inputs: Inputs
    rundir: RunDir
    observer: RunObserver
    generation: RayGeneration
    scoring: RayScoring
    transport: Transport
    export: Callable[[WeightVersion], None]  # writes the trained model; may block
    first_prompt: int  # cursor of a run that begins at step 0


@dataclass(slots=True, kw_only=True)
class Attempt:
    """Training with one learner and one buffer.

    `again` says whether this process had an attempt before.
    """

    place: Place
    learner: RayLearner
    buffer: RayBuffer
    checkpoint: Checkpoint | None
    again: bool
    sync: WeightSync = field(init=False)
    evaluations: BesideTraining = field(init=False)
    checkpoints: Checkpoints | None = None
    pipeline: Pipeline | None = None
    growing: bool = False  # it will end between two steps, for an attempt with all ranks

    def __post_init__(self) -> None:
        config = self.place.config
        self.evaluations = BesideTraining(
            every={each.name: each.every for each in config.evaluation.all_sets},
            last_version=config.run.steps,
            hold_s=config.evaluation.hold_s,
            measure=self._measure_beside,
            record=self.place.observer,
        )
        self.sync = WeightSync(
            self.learner,
            self.place.generation,
            self.buffer,
            config.weights.publish_every,
            time.monotonic,
            self.place.scoring.follow,
            make_way=self.evaluations.make_way,
            went_live=self.evaluations.live,
        )

    @property
    def state(self) -> RunState | None:
        return None if self.checkpoint is None else self.checkpoint.state

    @property
    def publish_timeout_s(self) -> float:
        """Most seconds until a version is live, over all tries of `WeightSync`."""
        return publish_deadline_s(self.place.config, self.place.inputs.weights_bytes)

    async def train(self) -> tuple[float | None, float | None]:
        """Train to the end. Returns the rewards of the first evaluation set before and after training.

        Raises: `Stopped`, `RoomAgain`, and any error that ends training.
        """
        try:
            return await self._train()
        finally:
            await self.evaluations.close()

    async def _train(self) -> tuple[float | None, float | None]:
        config, state = self.place.config, self.state
        depth = depth_controller(config.staleness)
        await self._restore(depth)
        first_step = 0 if state is None else state.step
        await self.sync.publish_last(first_step, self.publish_timeout_s)
        before = state.reward_before if state else await self._evaluate(0)
        cutter = Cutter(
            config=config,
            rundir=self.place.rundir,
            buffer=self.buffer,
            sync=self.sync.stats,
            depth=depth,
            first_prompt=state.first_prompt if state else self.place.first_prompt,
            reward_before=before,
            observer=self.place.observer,
            reference=self.place.scoring.reference_version,
        )
        self.checkpoints = await cutter.checkpoints(self.learner, state)
        self.pipeline = await self._pipeline(depth, cutter.first_prompt)
        done = await self.pipeline.run()
        if self.pipeline.stopped:
            if done:
                await self.checkpoints.save_now(done, save_deadline_s(config))
                await self.checkpoints.copied()
            if self.growing:
                raise RoomAgain(f"there is room for all {config.learner.ranks} learner ranks again")
            raise Stopped(stopped_text(config, self.checkpoints.stats.last))
        await self.sync.publish_last(config.run.steps, self.publish_timeout_s)
        await self._export()  # first: nothing that an evaluation meets may cost the trained model
        after = await self._evaluate(config.run.steps)
        await self.checkpoints.copied()
        return before, after

    def fitted_buffer(self, state: RunState) -> BufferState:
        """Return the buffer's part of `state`, reduced to what the current settings allow."""
        found = trim_to_bound(state.buffer, build_gate(self.place.config))
        if over := len(state.buffer.open) - len(found.open):
            self.place.observer.event(
                f"{over} of {len(state.buffer.open)} groups in flight are discarded: with staleness."
                f"max_staleness = {self.place.config.staleness.max_staleness} and look_ahead = "
                f"{self.place.config.staleness.look_ahead} their turn comes too late"
            )
        return found

    async def grow(
        self,
        has_room: Callable[[], Awaitable[bool]],
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """End `train` with `RoomAgain` between two steps, once all ranks can be placed.

        Waits for: a checkpoint of this attempt, then free resources. It checks again after each
        further checkpoint.
        """
        asked = -1 if self.state is None else self.state.step
        while True:
            await pause(LOOK_EVERY_S)
            last = -1 if self.checkpoints is None else self.checkpoints.stats.last
            if self.pipeline is None or last <= asked:
                continue
            asked = last
            if await has_room() and not self.pipeline.stopped:
                self.growing = True
                await self.pipeline.stop()
                return

    async def stop(self) -> None:
        """End training at the next boundary between two steps, for good."""
        self.growing = False
        if self.pipeline is not None:
            await self.pipeline.stop()

    async def abandon(self) -> None:
        """End everything that this attempt has in progress, after learner and buffer have failed.

        Waits for: a publish and a checkpoint in progress. Both end without a learner, and have
        deadlines.
        """
        await self.evaluations.close()
        await self.sync.abandon(self.publish_timeout_s)
        if self.checkpoints is not None:
            await self.checkpoints.drain()
            self.checkpoints.close()

    async def _restore(self, depth: DepthController | None) -> None:
        """Restore everything that the learner and the buffer do not restore themselves.

        Writes of an earlier learner in progress can then not become visible.

        Waits for: the weight store, like `on_store`.
        """
        place, state = self.place, self.state
        config = place.config
        timeout_s = config.weights.publish_timeout_s
        await place.observer.on_disk(place.rundir.check_claim)
        writer = await begin_attempt(config.weights_dir, timeout_s)
        self.learner.writer = place.scoring.writer = writer
        if self.again or state is not None:
            await on_store(
                config.weights_dir,
                timeout_s,
                resume.rewind_weights,
                place.rundir,
                self.checkpoint,
            )
        if self.again:
            await place.observer.cut_back(self.checkpoint)
            await run_in_thread(place.transport.begin_anew)
        if state is None:
            return
        self.sync.stats.skipped = state.publishes_skipped
        if depth is not None and state.depth is not None:
            depth.load_state(state.depth)
            await self.buffer.set_pipeline_depth(depth.depth)

    async def _pipeline(self, depth: DepthController | None, first_prompt: int) -> Pipeline:
        """Build the pipeline, after rewinding the stored groups.

        Waits for: the rewind, at most `buffer.write_timeout_s` per few files.
        """
        place, config, state = self.place, self.place.config, self.state
        on_disk = functools.partial(
            patience_of(config.buffer, config.observe).aside,
            f"the groups in {config.run_dir / 'experience'}",
        )
        loop = asyncio.get_running_loop()
        tell = functools.partial(loop.call_soon_threadsafe, place.observer.event)
        gate = build_gate(config)
        open_tickets = () if state is None else self.fitted_buffer(state).open
        places = {ticket.number: place for place, ticket in enumerate(open_tickets)}

        def trainable(ticket: Ticket, oldest_version: int) -> bool:
            place = places.get(ticket.number)
            first_step = 0 if state is None else state.step
            return (
                place is None or gate.latest_step(first_step, place) - oldest_version <= gate.bound
            )

        recovery = await on_disk(recovery_of, config, None if state is None else state.step, tell)
        if recovery is not None:
            await recovery.rewind_aside(on_disk)
        return Pipeline(
            generation=place.generation,
            scoring=place.scoring,
            buffer=self.buffer,
            learner=self.learner,
            sync=self.sync,
            prompts=place.inputs.prompts,
            observer=place.observer,
            sampling=config.sampling,
            num_steps=config.run.steps,
            groups_per_step=config.fresh_groups,
            max_error_rate=config.scoring.max_error_rate,
            live_timeout_s=self.publish_timeout_s,
            trains_on=config.algorithm.trains_on,
            depth=depth,
            num_workers=place.observer.num_workers,
            pool_busy=place.scoring.take_busy,
            checkpoints=self.checkpoints,
            first_step=0 if state is None else state.step,
            first_prompt=first_prompt,
            open=open_tickets,
            trainable=trainable,
            replayable=() if state is None else state.buffer.replayable,
            on_disk=on_disk,
            recovery=recovery,
        )

    async def _evaluate(self, step: int) -> float | None:
        """Evaluate every set before or after training; return the reward of the first one.

        A point that the record has already is not measured again.
        """
        place, rewards = self.place, list[float | None]()
        for each in place.config.evaluation.all_sets:
            if step == 0 and each.skip_first:
                rewards.append(None)
            elif place.observer.has_point(each.name, step):
                rewards.append(place.observer.point(each.name, step))
            else:
                place.observer.state("evaluating")
                found = await self._measure(each.name, step)
                rewards.append(place.observer.record_point(each.name, step, found))
        return rewards[0] if rewards else None

    async def _measure_beside(self, name: str, version: int) -> Evaluation:
        return await self._measure(name, version, self.place.config.run.groups_per_step)

    async def _measure(self, name: str, version: int, at_once: int | None = None) -> Evaluation:
        """Evaluate `version`, which is live, on the set `name`."""
        place = self.place
        [of] = [each for each in place.config.evaluation.all_sets if each.name == name]
        sampling = Sampling(
            num_samples=of.samples,
            temperature=of.temperature,
            max_tokens=of.max_response_tokens or place.config.generation.max_response_tokens,
        )
        prompts = place.inputs.evaluation_prompts[name]
        return await evaluate(place.generation, place.scoring, prompts, sampling, version, at_once)

    async def _export(self) -> None:
        """Write the last version as a model folder.

        Raises: `StalledError` after `weights.publish_timeout_s`.
        Waits for: the write.
        """
        config, version = self.place.config, self.sync.last
        assert version is not None
        timeout_s = config.weights.publish_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                await run_in_thread(self.place.export, version)
        except TimeoutError as error:
            raise StalledError(
                f"{self.place.rundir.final}: the trained model was not written within "
                f"weights.publish_timeout_s = {timeout_s:g} s. Look at that disk, or raise it; the "
                "same command resumes the run"
            ) from error


async def begin_attempt(root: Path, timeout_s: float) -> Writer:
    """Begin an attempt, and return the only writer that can publish into `root` from then on.

    Waits like `on_store`.
    """
    return await on_store(root, timeout_s, store.begin_attempt, root)


async def on_store(root: Path, timeout_s: float, call: Callable[..., T], *arguments: Any) -> T:
    """Call `call`, which takes the lock of the store `root`, in a thread; returns its result.

    Raises: `CoreLost` after the longer of `timeout_s` and twice the wait for that lock. The process
    that holds the lock may be dead by the next attempt, so another attempt is worthwhile.
    Waits for: the call.
    """
    limit_s = max(timeout_s, reply_deadline(2 * LOCK_TIMEOUT_S))
    patience = DiskDeadline(limit_s=limit_s, setting="the wait for the lock of the weight store")
    try:
        return await patience.aside(f"the weight store {root}", call, *arguments)
    except StalledError as error:
        raise CoreLost(str(error)) from error


def save_deadline_s(config: RunConfig) -> float:
    """Return the seconds for a checkpoint in progress, then the copy and write of another one."""
    one_s = config.checkpoint.timeout_s
    return reply_deadline(one_s, reply_deadline(config.learner.step_timeout_s), one_s)
