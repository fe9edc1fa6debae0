"""Driver of an offline stage, from its configuration to its result: ranks as Ray actors.

    check inputs -> Ray -> preflight -> run directory
        -> ranks: [load] -> evaluate -> (train -> checkpoint)* -> evaluate -> report -> weights
        -> export -> summary

Promises:
- errors in the input are reported before anything starts;
- rerunning the command resumes a stage that was killed, was stopped or failed, from its last
  checkpoint. Its result is that of an uninterrupted stage;
- after a rank failure the stage resumes automatically, `learner.max_restarts` times
  (`rlhf_cluster.run.restarts`);
- however the stage ends, all its actors and placement groups are removed, and the run directory says
  how it ended.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

from actors.drivers.open_run import in_run_directory

# isort: split
from actors.cluster.signals import ended_by_signals
from actors.drivers.checkpoint_cut import checkpoint_metrics
from actors.drivers.offline_observer import StageObserver
from actors.drivers.training_attempt import (
    Stopped,
    begin_attempt,
    stopped_text,
)
from actors.services.learner_core import core_restarts
from actors.services.offline_rank_actors import (
    RayStage,
    StageCore,
)
from actors.services.start_services import Launcher
from rlhf_cluster.config import StageConfig
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.observe.record.logs import configure
from rlhf_cluster.observe.report.learning_curve import draw_stage_curve
from rlhf_cluster.observe.report.live_view import LiveView
from rlhf_cluster.offline import (
    STAGES,
    build_stage,
)
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.planning.placement import demand, total_resources
from rlhf_cluster.planning.run_inputs import (
    StageInputs,
    check_stage_inputs,
)
from rlhf_cluster.planning.start_deadline import with_start_deadline
from rlhf_cluster.records import LearnerState
from rlhf_cluster.run.checkpoint.background_saving import (
    Checkpoints,
    CheckpointStats,
)
from rlhf_cluster.run.checkpoint.checkpoint_folder import (
    Checkpoint,
    steps,
)
from rlhf_cluster.run.checkpoint.remote_copies import (
    Copies,
    folder_of,
)
from rlhf_cluster.run.checkpoint.resume import Continuation
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.run.restarts import (
    find_restart_checkpoint,
    with_recovery,
)
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.json_files import write_json
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.weights import store
from rlhf_cluster.weights.writer_fence import Writer, publishing

log = logging.getLogger(__name__)

REPORT = "report.json"


def run_stage(
    config: StageConfig, argv: list[str], overwrite: bool, accept_changes: bool = False
) -> dict[str, Any]:
    """Run `config` to its end, from the last checkpoint if there is one.

    Returns the summary, at once for a stage that has finished; raises the `RlhfError` that ended it.
    """
    config = config.with_absolute_paths()
    started = time.time()

    def run(
        inputs: StageInputs, rundir: RunDir, view: LiveView, found: Continuation
    ) -> dict[str, Any]:
        bounded = with_start_deadline(config, inputs.model_dir)
        stage = _StageRun(bounded, inputs, rundir, view, started, found.checkpoint)
        return asyncio.run(stage.supervised())

    return in_run_directory(
        config,
        argv,
        overwrite,
        accept_changes,
        lambda scratch: check_stage_inputs(config, scratch),
        lambda inputs: inputs.notes,
        run,
    )


class _StageRun:
    def __init__(
        self,
        config: StageConfig,
        inputs: StageInputs,
        rundir: RunDir,
        view: LiveView,
        started: float,
        checkpoint: Checkpoint | None,
    ) -> None:
        self.config, self.inputs, self.rundir, self.started = config, inputs, rundir, started
        configure("controller", "controller", rundir.logs)
        self.kind = STAGES[config.stage.type]
        self.checkpoint = checkpoint  # from which the stage resumes
        self.checkpoints: Checkpoints | None = None
        self.restarts = core_restarts(config)
        self.stopping = False
        self.before: float | None = None  # headline metric of held-out units before training
        self.held_out: float | None = None
        self.writer: Writer
        self.launcher = Launcher(
            config=config,  # type: ignore[arg-type]
            model_dir=str(inputs.model_dir),
            engine_factory="",
            engine_environment={},
        )
        self.observer = StageObserver(
            config,
            rundir,
            inputs.num_steps,
            self.kind.headline,
            inputs.stream.counts.metrics(),
            view.update,
            started,
        )

    async def supervised(self) -> dict[str, Any]:
        """Run the stage. A signal ends it after the current step, or at once if none has begun."""

        def stop() -> bool:
            begun, self.stopping = self.checkpoints is not None, True
            return begun

        notice_s = self.config.checkpoint.notice_s
        text = functools.partial(stopped_text, self.config)
        return await ended_by_signals(
            self._run(), stop, notice_s, lambda: text(self._last_checkpoint)
        )

    @property
    def _last_checkpoint(self) -> int:
        """Step of the last complete checkpoint, -1 before the first."""
        if self.checkpoints is not None:
            return self.checkpoints.stats.last
        return -1 if self.checkpoint is None else self.checkpoint.state.step

    async def _run(self) -> dict[str, Any]:
        observer = self.observer
        try:
            observer.state("starting")
            for note in self.inputs.notes:
                observer.event(note)
            if self.checkpoint is not None:
                await observer.resumed(self.checkpoint.state.step)
            await self._begin()
            summary = await with_recovery(
                self._attempt, self._recover, self.restarts, observer.event
            )
            await observer.finished()
            return summary
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError | Stopped)
            observer.state("stopped" if stopped else "failed", str(error) or type(error).__name__)
            if not stopped:
                await observer.post_mortem(error)
            raise
        finally:
            await run_in_thread(observer.close)

    async def _begin(self) -> None:
        """Begin an attempt. Writes of earlier attempts in progress can then not become visible."""
        self.writer = await begin_attempt(self.rundir.weights, self.config.checkpoint.timeout_s)

    async def _attempt(self) -> dict[str, Any]:
        """Run the stage with one set of ranks, until it ends or a rank fails."""
        core = StageCore(self.launcher)
        try:
            stage = await core.start_stage(self.inputs.num_steps)
            if self.checkpoint is not None:
                await stage.load_state(self.checkpoint.learner, self.checkpoint.state.learner)
            async with core.watched(_nothing()):
                return await self._train(stage)
        except RlhfError as error:
            await self.observer.look_at_processes()
            loss = await core.loss_behind(error)
            if loss is error:
                raise
            raise loss from error
        finally:
            core.take_down()
            if self.checkpoints is not None:
                self.checkpoints.close()

    async def _recover(self, lost: RlhfError) -> None:
        if self.stopping:
            raise Stopped(f"{stopped_text(self.config, self._last_checkpoint)}. {lost}") from lost
        if self.checkpoints is not None:
            await self.checkpoints.drain()
        self.checkpoints = None
        await self._begin()
        self.checkpoint = await run_in_thread(
            find_restart_checkpoint, self.rundir, self.config, lost
        )
        await self.observer.cut_back(self.checkpoint)
        step = None if self.checkpoint is None else self.checkpoint.state.step
        self.observer.recovering(lost, self.restarts.used, self.restarts.limit, step)

    async def _train(self, stage: RayStage) -> dict[str, Any]:
        """Train all remaining steps, and return the summary of the stage.

        Waits for: each step, within its deadline.
        """
        state = None if self.checkpoint is None else self.checkpoint.state
        step = 0 if state is None else state.step
        self.checkpoints = await self._checkpoints(stage, state)
        await run_in_thread(
            store.rewind, self.rundir.weights, -1
        )  # the end of the stage writes it again
        if state is None:
            self.before = await self._evaluate(stage, 0)
        else:
            self.before, self.held_out = state.reward_before, self._held_out_of(state)
        while step < self.inputs.num_steps:
            if self.stopping:
                await self.checkpoints.save_now(step, self.config.checkpoint.notice_s)
                raise Stopped(stopped_text(self.config, self._last_checkpoint))
            units, began = self.inputs.batch(step), time.monotonic()
            report = await stage.train(units)
            step = report.step
            counters = checkpoint_metrics(self.checkpoints)
            self.observer.step(report, units, time.monotonic() - began, counters)
            every = self.config.run.evaluate_every
            if step < self.inputs.num_steps and every and step % every == 0:
                await self._evaluate(stage, step)
            await self.checkpoints.after_step(step)
        return await self._finish(stage)

    async def _finish(self, stage: RayStage) -> dict[str, Any]:
        from rlhf_cluster.weights.formats.huggingface import export_hf

        config, rundir = self.config, self.rundir
        assert self.checkpoints is not None
        await self._evaluate(stage, self.inputs.num_steps)
        held_out = self.inputs.stream.held_out
        report = await stage.report(held_out) if held_out else {}
        if held_out:
            kind = build_stage(config.stage, StageContext(data=config.data))
            report = await run_in_thread(kind.conclude, report, held_out, rundir.path)
        await self.observer.on_disk(write_json, rundir.path / REPORT, report)
        await self.checkpoints.drain()
        await self.checkpoints.copied()
        version = await stage.write_final(rundir.weights, self.writer)
        num_values = (
            cast(Any, config.stage).num_values if config.stage.model_kind == "value" else None
        )
        export = functools.partial(
            export_hf,
            version,
            self.inputs.model_dir,
            rundir.final,
            num_values=num_values,
            tokenizer_dir=config.model.tokenizer,
        )
        await run_in_thread(export)
        return await self.observer.on_disk(self._write_summary, report)

    def _write_summary(self, report: Mapping[str, Any]) -> dict[str, Any]:
        config, rundir, headline = self.config, self.rundir, self.kind.headline
        draw_stage_curve(self.observer.records(), rundir.curve, config.run.name, headline)
        summary = {
            "run": config.run.name,
            "run_dir": str(rundir.path),
            "stage": config.stage.type,
            "steps": self.inputs.num_steps,
            "metric": headline,
            "before": self.before,
            "after": self.held_out,
            "data": self.inputs.stream.counts.metrics(),
            "data_notes": self.inputs.notes,
            "report": report,
            "first_step_s": self.observer.first_step_s,
            "total_s": time.time() - self.started,
            "final_model": str(rundir.final),
            "demand": total_resources(demand(config)),
        }
        rundir.write_summary(summary)
        return summary

    async def _evaluate(self, stage: RayStage, step: int) -> float | None:
        if not self.inputs.stream.held_out:
            return None
        self.observer.state("evaluating")
        found = await stage.evaluate(self.inputs.stream.held_out)
        self.held_out = self.observer.evaluation(step, found)
        return self.held_out

    async def _checkpoints(self, stage: RayStage, resumed: RunState | None) -> Checkpoints:
        settings, copy = self.config.checkpoint, folder_of(self.config)
        copies = None
        if copy is not None:
            timeout_s = settings.timeout_s
            copies = Copies(
                run=self.rundir, copy=copy, timeout_s=timeout_s, tell=self.observer.event
            )
            if resumed is not None:
                copies.follow(await self.observer.on_disk(steps, self.rundir.checkpoints))
        return Checkpoints(
            root=self.rundir.checkpoints,
            every=settings.every,
            keep=settings.keep,
            keep_best=settings.keep_best,
            num_steps=self.inputs.num_steps,
            learner=stage,  # type: ignore[arg-type]
            cut=self._cut,
            tell=self.observer.event,
            clock=time.monotonic,
            timeout_s=settings.timeout_s,
            told_fraction=self.config.observe.slow_write_fraction,
            kept=self._record_checkpoints,
            check_owner=self.rundir.check_claim,
            fence=functools.partial(publishing, self.rundir.weights, self.writer),
            copies=copies,
            stats=CheckpointStats(last=-1 if resumed is None else resumed.step),
        )

    async def _record_checkpoints(self, states: Sequence[RunState]) -> None:
        self.observer.checkpointed(states[-1].step)

    async def _cut(self, step: int, learner: LearnerState) -> RunState:
        sign = -1.0 if self.kind.lower_is_better else 1.0
        return RunState.of_stage(
            learner,
            before=self.before,
            score=None if self.held_out is None else sign * self.held_out,
            packages=self.observer.packages,
        )

    def _held_out_of(self, state: RunState) -> float | None:
        sign = -1.0 if self.kind.lower_is_better else 1.0
        return None if state.score is None else sign * state.score


async def _nothing() -> None:
    """Do nothing: a stage has only ranks to watch, no buffer."""
