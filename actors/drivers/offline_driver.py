"""Driver of an offline stage, from its configuration to its result: ranks as Ray actors.

    ranks: [load] -> evaluate -> (train -> checkpoint)* -> evaluate -> report -> weights
        -> export -> summary

Promises:
- rerunning the command resumes a stage that was killed, was stopped or failed, from its last
  checkpoint. Its result is that of an uninterrupted stage;
- after a rank failure the stage resumes automatically, `learner.max_restarts` times
  (`rlhf_cluster.run.restarts`);
- however the stage ends, all its actors and placement groups are removed.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from actors.drivers.driver import Opened, Stopped, TrainingDriver

# isort: split
from actors.drivers.checkpoint_cut import checkpoint_metrics, make_checkpoints
from actors.drivers.run_observer import StageObserver
from actors.drivers.training_attempt import begin_attempt
from actors.services.learner_core import Core
from actors.services.rank_actors import RayStage
from rlhf_cluster.config import StageConfig
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.observe.report.learning_curve import draw_stage_curve
from rlhf_cluster.offline import STAGES, build_stage
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.planning.run_inputs import StageInputs, check_stage_inputs
from rlhf_cluster.records import LearnerState
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.util.durable_files import write_json
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.weights import store
from rlhf_cluster.weights.writer_fence import Writer, publishing

log = logging.getLogger(__name__)

REPORT = "report.json"


class StageDriver(TrainingDriver[StageConfig, StageInputs, StageObserver]):
    """An offline stage."""

    def __init__(self, opened: Opened[StageConfig, StageInputs]) -> None:
        super().__init__(replace(opened, engine_factory=""))  # a stage generates nothing
        self.kind = STAGES[self.config.stage.type]
        self.saving: Checkpoints | None = None
        self.before: float | None = None  # headline metric of held-out units before training
        self.held_out: float | None = None
        self.writer: Writer
        self.observer = StageObserver(
            self.config,
            self.rundir,
            self.inputs.num_steps,
            self.kind.headline,
            self.inputs.stream.counts.metrics(),
            self.show,
            self.started_s,
        )

    @staticmethod
    def check_inputs(config: StageConfig, scratch: Path) -> StageInputs:
        return check_stage_inputs(config, scratch)

    @staticmethod
    def notes(config: StageConfig, inputs: StageInputs) -> Sequence[str]:
        return inputs.notes

    @property
    def checkpoints(self) -> Checkpoints | None:
        return self.saving

    def ask_to_stop(self) -> bool:
        """End the stage after the current step, or at once if none has begun."""
        self.stopping = True
        return self.saving is not None

    async def work(self) -> dict[str, Any]:
        for note in self.inputs.notes:
            self.observer.event(note)
        await self._begin()
        return await self.train_with_restarts()

    def make_core(self) -> Core:
        return Core(self.launcher)

    async def train(self, core: Core) -> dict[str, Any]:
        stage = await core.start_stage(self.inputs.num_steps)
        if self.checkpoint is not None:
            await stage.load_state(self.checkpoint.learner, self.checkpoint.state.learner)
        async with core.watched(_nothing()):
            return await self._train(stage)

    async def abandon(self, lost: RlhfError) -> None:
        saving, self.saving = self.saving, None
        if saving is not None:
            await saving.drain()
            saving.close()
        await self._begin()

    async def _begin(self) -> None:
        """Begin an attempt. Writes of earlier attempts in progress can then not become visible."""
        self.writer = await begin_attempt(self.rundir.weights, self.config.checkpoint.timeout_s)

    async def _train(self, stage: RayStage) -> dict[str, Any]:
        """Train all remaining steps, and return the summary of the stage.

        Waits for: each step, within its deadline.
        """
        state = None if self.checkpoint is None else self.checkpoint.state
        step = 0 if state is None else state.step
        if self.again:
            await self.observer.cut_back(self.checkpoint)
        checkpoints = self.saving = await self._checkpoints(stage, state)
        await run_in_thread(
            store.rewind, self.rundir.weights, -1
        )  # the end of the stage writes it again
        if state is None:
            self.before = await self._evaluate(stage, 0)
        else:
            self.before, self.held_out = state.reward_before, self._held_out_of(state)
        while step < self.inputs.num_steps:
            if self.stopping:
                await checkpoints.save_now(step, self.config.checkpoint.notice_s)
                raise Stopped(self.stopped_text())
            units, began = self.inputs.batch(step), time.monotonic()
            report = await stage.train(units)
            step = report.step
            counters = checkpoint_metrics(checkpoints)
            self.observer.step(report, units, time.monotonic() - began, counters)
            every = self.config.run.evaluate_every
            if step < self.inputs.num_steps and every and step % every == 0:
                await self._evaluate(stage, step)
            await checkpoints.after_step(step)
        return await self._finish(stage, checkpoints)

    async def _finish(self, stage: RayStage, checkpoints: Checkpoints) -> dict[str, Any]:
        from rlhf_cluster.weights.formats.huggingface import export_hf

        config, rundir = self.config, self.rundir
        await self._evaluate(stage, self.inputs.num_steps)
        held_out = self.inputs.stream.held_out
        report = await stage.report(held_out) if held_out else {}
        if held_out:
            kind = build_stage(config.stage, StageContext(data=config.data))
            report = await run_in_thread(kind.conclude, report, held_out, rundir.path)
        await self.observer.on_disk(write_json, rundir.path / REPORT, report)
        await checkpoints.drain()
        await checkpoints.copied()
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
        return self.write_summary(
            stage=config.stage.type,
            steps=self.inputs.num_steps,
            metric=headline,
            before=self.before,
            after=self.held_out,
            data=self.inputs.stream.counts.metrics(),
            data_notes=self.inputs.notes,
            report=report,
            final_model=str(rundir.final),
        )

    async def _evaluate(self, stage: RayStage, step: int) -> float | None:
        if not self.inputs.stream.held_out:
            return None
        self.observer.state("evaluating")
        found = await stage.evaluate(self.inputs.stream.held_out)
        self.held_out = self.observer.evaluation(step, found)
        return self.held_out

    async def _checkpoints(self, stage: RayStage, resumed: RunState | None) -> Checkpoints:
        return await make_checkpoints(
            self.config,
            self.rundir,
            self.observer,
            num_steps=self.inputs.num_steps,
            learner=stage,
            cut=self._cut,
            kept=self._record_checkpoints,
            fence=functools.partial(publishing, self.rundir.weights, self.writer),
            resumed=resumed,
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
