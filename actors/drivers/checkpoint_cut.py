"""Checkpoints of a run on Ray: the content of one, and the claim of a run directory to resume."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from actors.drivers.rl_observer import RunObserver
from actors.services.buffer_actor import RayBuffer
from actors.services.learner_actors import RayLearner
from rlhf_cluster.buffer.adaptive_depth import DepthController
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.records import LearnerState
from rlhf_cluster.run.checkpoint import (
    checkpoint_folder,
    resume,
)
from rlhf_cluster.run.checkpoint.background_saving import (
    Checkpoints,
    CheckpointStats,
)
from rlhf_cluster.run.checkpoint.remote_copies import (
    Copies,
    CopyStats,
    folder_of,
)
from rlhf_cluster.run.checkpoint.resume import Continuation
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.weights import store
from rlhf_cluster.weights.sync import SyncStats
from rlhf_cluster.weights.writer_fence import publishing


def claimed(
    config: AnyConfig, argv: list[str], overwrite: bool, accept_changes: bool
) -> tuple[RunDir, Continuation]:
    """Claim the run's directory. Returns it with the state from which the run continues.

    A directory whose run has finished is not claimed, because there is nothing to do.

    Raises: `RunError`.
    """
    fresh = overwrite or not RunDir.has_run(config.run_dir)
    if fresh:
        run = RunDir.create(config.run_dir, config, overwrite=overwrite, argv=argv)
    else:
        run = RunDir.reclaim(config.run_dir, config)
    try:
        if fresh:
            known = resume.whole_copy(run, config, overwrite)
            if known.checkpoint is None:
                return run, Continuation(finished=False, checkpoint=None, notes=[])
        else:
            known = resume.whole_or_copy(run, config)
        found = resume.look(run, config, accept_changes, known)
    except BaseException:
        if fresh and not checkpoint_folder.steps(run.checkpoints):
            run.remove()
        else:
            run.withdraw()
        raise
    if found.finished:
        run.withdraw()
    elif found.checkpoint is None and not found.kept:
        run.restart(config, argv)
    else:
        run.summary.unlink(missing_ok=True)
        run.go_on(config, argv)
        if found.checkpoint is not None:
            resume.cut_back(run, found.checkpoint)
    return run, found


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
        """Build the saving of checkpoints for an attempt that continues from `resumed`, or from step 0.

        Waits for: the list of existing checkpoints, if checkpoints are copied.
        """
        settings, copies = self.config.checkpoint, self._copies()
        if copies is not None and resumed is not None:
            copies.follow(
                await self.observer.on_disk(checkpoint_folder.steps, self.rundir.checkpoints)
            )
        return Checkpoints(
            root=self.rundir.checkpoints,
            every=settings.every,
            keep=settings.keep,
            keep_best=settings.keep_best,
            num_steps=self.config.run.steps,
            learner=learner,
            cut=self.cut,
            tell=self.observer.event,
            clock=time.monotonic,
            timeout_s=settings.timeout_s,
            told_fraction=self.config.observe.slow_write_fraction,
            kept=self.kept,
            check_owner=self.rundir.check_claim,
            fence=functools.partial(publishing, self.config.weights_dir, learner.writer),
            copies=copies,
            stats=CheckpointStats(last=-1 if resumed is None else resumed.step),
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

    def _copies(self) -> Copies | None:
        copy = folder_of(self.config)
        if copy is None:
            return None
        timeout_s = self.config.checkpoint.timeout_s
        return Copies(run=self.rundir, copy=copy, timeout_s=timeout_s, tell=self.observer.event)

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
