"""Checkpoints of a run on Ray: how they are saved, and the content of one."""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.drivers.rl_observer import RunObserver
from actors.drivers.run_observer import Observer
from actors.services.buffer_actor import RayBuffer
from actors.services.rank_actors import RayLearner
from rlhf_cluster.buffer.adaptive_depth import DepthController
from rlhf_cluster.config import GenerateConfig, RunConfig
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.records import LearnerState
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.checkpoint.background_saving import (
    Checkpoints,
    CheckpointStats,
    Cut,
)
from rlhf_cluster.run.checkpoint.remote_copies import (
    Copies,
    CopyStats,
    folder_of,
)
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.weights import store
from rlhf_cluster.weights.sync import SyncStats
from rlhf_cluster.weights.writer_fence import publishing


async def make_checkpoints(
    config: AnyConfig,
    rundir: RunDir,
    observer: Observer[Any],
    *,
    num_steps: int,
    learner: Any,
    cut: Cut,
    kept: Callable[[Sequence[RunState]], Awaitable[None]],
    fence: checkpoint_folder.Fence,
    resumed: RunState | None,
) -> Checkpoints:
    """Build the saving of checkpoints for an attempt that continues from `resumed`, or from step 0.

    Args:
        learner: copies and writes the state of the ranks.
        cut: returns the state of the run between two steps.
        kept: gets the states that are on disk after each checkpoint.
        fence: lets only the current attempt complete a checkpoint.
    Waits for: the list of existing checkpoints, if checkpoints are copied.
    """
    assert not isinstance(config, GenerateConfig)
    settings, copy, copies = config.checkpoint, folder_of(config), None
    if copy is not None:
        copies = Copies(run=rundir, copy=copy, timeout_s=settings.timeout_s, tell=observer.event)
        if resumed is not None:
            copies.follow(await observer.on_disk(checkpoint_folder.steps, rundir.checkpoints))
    return Checkpoints(
        root=rundir.checkpoints,
        every=settings.every,
        keep=settings.keep,
        keep_best=settings.keep_best,
        num_steps=num_steps,
        learner=learner,
        cut=cut,
        tell=observer.event,
        clock=time.monotonic,
        timeout_s=settings.timeout_s,
        told_fraction=config.observe.slow_write_fraction,
        kept=kept,
        check_owner=rundir.check_claim,
        fence=fence,
        copies=copies,
        stats=CheckpointStats(last=-1 if resumed is None else resumed.step),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cutter:
    """Collects a consistent snapshot of a run between two steps.

    `rlhf_cluster.run.checkpoint` decides when.
    """

    config: RunConfig
    rundir: RunDir
    buffer: RayBuffer
    sync: SyncStats
    depth: DepthController | None
    first_prompt: int
    reward_before: float | None
    observer: RunObserver
    reference: Callable[[], int | None]  # returns the version of the stored reference in use

    async def checkpoints(self, learner: RayLearner, resumed: RunState | None) -> Checkpoints:
        """Build the saving of checkpoints of the run. Waits like `make_checkpoints`."""
        return await make_checkpoints(
            self.config,
            self.rundir,
            self.observer,
            num_steps=self.config.run.steps,
            learner=learner,
            cut=self.cut,
            kept=self.kept,
            fence=functools.partial(publishing, self.config.weights_dir, learner.writer),
            resumed=resumed,
        )

    async def cut(self, step: int, learner: LearnerState) -> RunState:
        """Collect the state of the run after `step` steps.

        The reference in use is pinned: it stays on disk until no checkpoint names it.
        """
        return RunState(
            step=step,
            learner=learner,
            buffer=await self.buffer.state(step),
            live_version=self.sync.live,
            publishes_skipped=self.sync.skipped,
            depth=None if self.depth is None else self.depth.state(),
            first_prompt=self.first_prompt,
            reference=await self.observer.on_disk(self._pinned_reference),
            reward_before=self.reward_before,
            packages=self.observer.packages,
            score=self.observer.snapshot.reward_mean10,
        )

    async def kept(self, states: Sequence[RunState]) -> None:
        """Record that exactly these checkpoints are on disk, and unpin the references of others."""
        self.observer.checkpointed(states[-1].step)
        await self.observer.on_disk(self._unpin_all_but, {state.reference for state in states})

    def _unpin_all_but(self, needed: set[int | None]) -> None:
        for version in store.pinned(self.rundir.reference):
            if version not in needed:
                store.unpin(self.rundir.reference, version)

    def _pinned_reference(self) -> int | None:
        if not self.config.stored_reference:
            return None
        version = self.reference()
        if version is not None:
            store.pin(self.rundir.reference, version)
        return version


def checkpoint_metrics(checkpoints: Checkpoints | None) -> Mapping[str, float]:
    if checkpoints is None:
        return {}
    stats = checkpoints.stats
    return {
        "checkpoint/step": float(stats.last),
        "checkpoint/wait_s": stats.wait_s,
        "checkpoint/write_s": stats.write_s,
        "checkpoint/bytes": float(stats.num_bytes),
        "checkpoint/skipped_total": float(stats.skipped),
        "checkpoint/failed_total": float(stats.failed),
        **({} if checkpoints.copies is None else _copy_metrics(checkpoints.copies.stats)),
    }


def _copy_metrics(stats: CopyStats) -> dict[str, float]:
    return {
        "checkpoint/copied_step": float(stats.last),
        "checkpoint/copies_failed_total": float(stats.failed),
    }
