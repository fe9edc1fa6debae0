"""The composition root: one run from its configuration to its result.

    check inputs -> Ray -> preflight -> run directory -> services -> warm-up -> version 0 live
        -> evaluate -> pipeline -> evaluate -> export -> summary

With a checkpoint in the run directory the learner loads it in place of the warm-up, and its version
goes live in place of version 0.

Promises: what is wrong with the input is said before anything starts; whatever ends the run, every
actor and placement group of it is taken down and the run directory says how it ended. Asked to end,
the run ends at the next boundary between two steps, with a checkpoint of it.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from actors.ray_cluster import connected, describe_demand

# isort: split
import ray
from rich.console import Console

from actors.checkpointing import Cutter, checkpoint_metrics, claimed
from actors.clients import RayGeneration, RayScoring
from actors.experience import RayBuffer
from actors.launch import preflight, take_down
from actors.learner import RayLearner
from actors.observer import RunObserver
from actors.pool import WorkerPool
from actors.services import (
    Launcher,
    generation_pool,
    scoring_pool,
    start_buffer,
    start_control,
    start_learner,
)
from actors.supervisor import Supervisor
from actors.transports import transport_of
from rlhf_cluster.checkpoint import continuing
from rlhf_cluster.checkpoint.folder import Checkpoint
from rlhf_cluster.checkpoint.saving import Checkpoints
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RunError, StalledError, first_failure
from rlhf_cluster.experience.adaptive import DepthController, depth_controller
from rlhf_cluster.inputs import Inputs, check_inputs
from rlhf_cluster.observe.live import LiveView
from rlhf_cluster.observe.logs import configure
from rlhf_cluster.observe.run_log import read_metrics
from rlhf_cluster.pipeline import Pipeline, evaluate
from rlhf_cluster.planning.placement import demand
from rlhf_cluster.rundir import RunDir, write_json
from rlhf_cluster.weights.export import export_hf
from rlhf_cluster.weights.sync import SyncStats, WeightSync

log = logging.getLogger(__name__)

DEFAULT_ENGINE = "actors.vllm_engine:make_engine"


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that runs, ready to work."""

    generation: RayGeneration
    scoring: RayScoring
    buffer: RayBuffer
    learner: RayLearner
    pools: tuple[WorkerPool, WorkerPool]


def run_config(
    config: RunConfig,
    overrides_argv: list[str],
    overwrite: bool,
    engine_factory: str = DEFAULT_ENGINE,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Run `config` to its end, from the last checkpoint where there is one.

    Returns the summary, at once for a run that has finished; raises the `RlhfError` that ended it.
    """
    config = config.with_absolute_paths()
    started = time.time()
    there = continuing.standing(config, overwrite, accept_changes)
    if there is not None and there.finished:
        return RunDir.open(config.run_dir).read_summary()
    with tempfile.TemporaryDirectory(prefix="rlhf-cluster-") as scratch:
        inputs = check_inputs(config, Path(scratch))
        with connected(config) as address:
            preflight(demand(config))
            rundir, found = claimed(config, overrides_argv, overwrite, accept_changes)
            with rundir:
                if found.finished:
                    return rundir.read_summary()
                inputs = _move_in(inputs, config, rundir)
                write_json(rundir.path / "control.json", {"ray_address": address})
                console = Console()
                for note in found.notes:
                    console.print(note, markup=False, highlight=False, soft_wrap=True)
                live = config.observe.live and console.is_terminal
                with LiveView(console, live=live) as view:
                    run = _Run(config, inputs, rundir, view, engine_factory, started)
                    run.checkpoint = found.checkpoint
                    run.patience_s = config.cluster.placement_timeout_s if found.notes else 0.0
                    return asyncio.run(run.supervised())


def _move_in(inputs: Inputs, config: RunConfig, rundir: RunDir) -> Inputs:
    """A made model belongs to the run."""
    if config.model.init is None:
        return inputs
    if not rundir.model.exists():
        shutil.copytree(inputs.model_dir, rundir.model)
    return replace(inputs, model_dir=rundir.model)


class _Stopped(RunError):
    """The run was asked to end, and did so at a boundary between two steps."""


class _Run:
    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        rundir: RunDir,
        view: LiveView,
        engine_factory: str,
        started: float,
    ) -> None:
        self.config, self.inputs, self.view = config, inputs, view
        self.rundir = rundir
        configure("controller", "controller", rundir.logs)
        self.started = started
        self.launcher = Launcher(
            config=config,
            model_dir=str(inputs.model_dir),
            engine_factory=engine_factory,
            engine_environment=_engine_environment(config, engine_factory),
        )
        self.checkpoint: Checkpoint | None = None  # from which the run goes on
        self.patience_s = 0.0  # for what an earlier attempt left on the cluster
        self.sync: WeightSync | None = None
        self.pipeline: Pipeline | None = None
        self.checkpoints: Checkpoints | None = None

    async def supervised(self) -> dict[str, Any]:
        """`_run`, ended early by SIGTERM or SIGINT; the outcome is in the run directory.

        The first signal ends it at the next boundary between two steps, within
        `checkpoint.notice_s`; the end of that time, or a second signal, at once.
        """
        task = asyncio.ensure_future(self._run())
        loop = asyncio.get_running_loop()
        asked: list[Any] = []

        def stop() -> None:
            if self.pipeline is None or asked:
                task.cancel()
            else:
                notice_s = self.config.checkpoint.notice_s
                asked.append(loop.call_later(notice_s, task.cancel))
                asked.append(loop.create_task(self.pipeline.stop()))

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop)
        try:
            return await task
        except asyncio.CancelledError:
            raise RunError(self._stopped_text()) from None
        finally:
            for request in asked:
                request.cancel()
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stopped_text(self) -> str:
        last = self.checkpoints.stats.last if self.checkpoints is not None else -1
        resume = f"The same command continues it from step {last}" if last >= 0 else "No checkpoint"
        return (
            f"run {self.config.run.name!r} was stopped by a signal; its metrics and published "
            f"weights are in {self.rundir.path}. {resume}"
        )

    async def _run(self) -> dict[str, Any]:
        control = await asyncio.to_thread(start_control, self.config, self.patience_s)
        pools = (generation_pool(self.launcher), scoring_pool(self.launcher))
        observer = RunObserver(
            self.config,
            self.rundir,
            [pool for pool, _ in pools],
            lambda: self.sync.stats if self.sync else SyncStats(),
            self.view.update,
            self.started,
            further=lambda: {
                **pools[0][1].metrics(),
                **pools[1][1].metrics(),
                **checkpoint_metrics(self.checkpoints),
            },
        )
        try:
            observer.state("starting")
            if self.checkpoint is not None:
                observer.resumed(self.checkpoint.state.step)
            transport = transport_of(self.config).serving()
            async with transport, self._services(pools, observer) as services:
                supervisor = Supervisor(control, services.pools, services.buffer, observer)
                async with supervisor.watching():
                    summary = await self._train(services, observer)
            observer.state("finished")
            return summary
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError | _Stopped)
            observer.state("stopped" if stopped else "failed", str(error) or type(error).__name__)
            if isinstance(error, StalledError):
                causes = "; ".join(pool.describe_errors() for pool, _ in pools)
                raise StalledError(f"{error}. {causes}") from error
            raise
        finally:
            ray.kill(control)
            observer.close()

    @asynccontextmanager
    async def _services(self, pools: Any, observer: RunObserver) -> AsyncIterator[Services]:
        """All services, started side by side, with the warm-up done or the checkpoint loaded."""
        (generation, generation_port), (scoring, scoring_port) = pools
        others: list[tuple[Any, Any]] = []
        try:
            async with asyncio.TaskGroup() as starts:
                learner_start = starts.create_task(self._start_learner(others, observer))
                state = None if self.checkpoint is None else self.checkpoint.state.buffer
                buffer_start = starts.create_task(start_buffer(self.launcher, others, state))
                starts.create_task(generation.start(self.config.generation.workers))
                starts.create_task(scoring.start(self.config.scoring.workers))
            services = Services(
                generation=generation_port,
                scoring=scoring_port,
                buffer=buffer_start.result(),
                learner=learner_start.result(),
                pools=(generation, scoring),
            )
            yield services
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from failures
        finally:
            generation.close()
            scoring.close()
            for actor, group in others:
                take_down(actor, group)

    async def _start_learner(
        self, others: list[tuple[Any, Any]], observer: RunObserver
    ) -> RayLearner:
        learner = await start_learner(self.launcher, others)
        if self.checkpoint is not None:
            await learner.load_state(self.checkpoint.learner, self.checkpoint.state.learner)
            return learner
        for step, examples in enumerate(self.inputs.warmup_batches(), start=1):
            observer.warmup(step, await learner.sft_step(examples))
        return learner

    async def _train(self, services: Services, observer: RunObserver) -> dict[str, Any]:
        config = self.config
        timeout_s = config.weights.publish_timeout_s + config.generation.pull_timeout_s
        if config.stored_reference:
            timeout_s += 2 * config.run.start_timeout_s  # to write and to load a reference
        depth = depth_controller(config.staleness)
        self.sync = WeightSync(
            services.learner,
            services.generation,
            services.buffer,
            config.weights.publish_every,
            time.monotonic,
            services.scoring.follow,
        )
        if self.checkpoint is not None:
            await self._restore(self.checkpoint, depth, services)
        state = None if self.checkpoint is None else self.checkpoint.state
        first_step = 0 if state is None else state.step
        await self.sync.publish_last(first_step, timeout_s)
        before = state.reward_before if state else await self._evaluate(services, observer, 0)
        cutter = Cutter(
            config=config,
            rundir=self.rundir,
            buffer=services.buffer,
            sync=self.sync.stats,
            depth=depth,
            first_prompt=state.first_prompt if state else self.inputs.prompts.cursor,
            reward_before=before,
            observer=observer,
        )
        self.checkpoints = cutter.checkpoints(services.learner, state)
        self.pipeline = self._pipeline(services, observer, depth, cutter.first_prompt, timeout_s)
        done = await self.pipeline.run()
        if self.pipeline.stopped:
            if done:
                await self.checkpoints.save_now(done, config.checkpoint.timeout_s)
            raise _Stopped(self._stopped_text())
        await self.sync.publish_last(config.run.steps, timeout_s)
        after = await self._evaluate(services, observer, config.run.steps)
        return self._finish(observer, before, after)

    async def _restore(
        self, checkpoint: Checkpoint, depth: DepthController | None, services: Services
    ) -> None:
        """What the learner and the buffer do not restore themselves."""
        state = checkpoint.state
        await asyncio.to_thread(continuing.rewind_weights, self.rundir, checkpoint)
        assert self.sync is not None
        self.sync.stats.skipped = state.publishes_skipped
        if depth is not None and state.depth is not None:
            depth.load_state(state.depth)
            await services.buffer.set_pipeline_depth(depth.depth)

    def _pipeline(
        self,
        services: Services,
        observer: RunObserver,
        depth: DepthController | None,
        first_prompt: int,
        timeout_s: float,
    ) -> Pipeline:
        config, state = self.config, None if self.checkpoint is None else self.checkpoint.state
        assert self.sync is not None
        return Pipeline(
            generation=services.generation,
            scoring=services.scoring,
            buffer=services.buffer,
            learner=services.learner,
            sync=self.sync,
            prompts=self.inputs.prompts,
            observer=observer,
            sampling=config.sampling,
            num_steps=config.run.steps,
            groups_per_step=config.run.groups_per_step,
            max_error_rate=config.scoring.max_error_rate,
            live_timeout_s=timeout_s,
            trains_on=config.algorithm.trains_on,
            depth=depth,
            checkpoints=self.checkpoints,
            first_step=0 if state is None else state.step,
            first_prompt=first_prompt,
            open=() if state is None else state.buffer.open,
        )

    async def _evaluate(self, services: Services, observer: RunObserver, step: int) -> float | None:
        prompts = self.inputs.evaluation_prompts
        if not prompts:
            return None
        observer.state("evaluating")
        max_tokens = self.config.generation.max_response_tokens
        answers = await evaluate(services.generation, services.scoring, prompts, max_tokens, step)
        return observer.evaluation(step, [answer.rewards[0] for answer in answers])

    def _finish(
        self, observer: RunObserver, before: float | None, after: float | None
    ) -> dict[str, Any]:
        from rlhf_cluster.observe.curve import draw_curve

        assert self.sync is not None
        assert self.sync.last is not None
        export_hf(self.sync.last, self.inputs.model_dir, self.rundir.final)
        draw_curve(read_metrics(self.rundir.metrics), self.rundir.curve, self.config.run.name)
        summary = {
            "run": self.config.run.name,
            "run_dir": str(self.rundir.path),
            "steps": self.config.run.steps,
            "reward_before": before,
            "reward_after": after,
            "first_step_s": observer.first_step_s,
            "total_s": time.time() - self.started,
            "final_model": str(self.rundir.final),
            "demand": describe_demand(self.config),
        }
        self.rundir.write_summary(summary)
        return summary


def _engine_environment(config: RunConfig, engine_factory: str) -> dict[str, str]:
    if engine_factory != DEFAULT_ENGINE:
        return {}
    from actors.vllm_arguments import engine_environment

    return engine_environment(config.generation.num_gpus > 0)
