"""The composition root: one run from its configuration to its result.

    check inputs -> Ray -> preflight -> run directory -> services -> warm-up -> version 0 live
        -> evaluate -> pipeline -> evaluate -> export -> summary

Promises: what is wrong with the input is said before anything starts; whatever ends the run, every
actor and placement group of it is taken down and the run directory says how it ended.
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
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RunError, StalledError, first_failure
from rlhf_cluster.inputs import Inputs, check_inputs
from rlhf_cluster.observe.live import LiveView
from rlhf_cluster.observe.logs import configure
from rlhf_cluster.observe.run_log import read_metrics
from rlhf_cluster.pipeline import Pipeline, evaluate
from rlhf_cluster.planning.placement import demand
from rlhf_cluster.records import Sampling
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
) -> dict[str, Any]:
    """Run `config` to its end. Returns the summary; raises the `RlhfError` that ended it."""
    config = with_absolute_paths(config)
    started = time.time()
    with tempfile.TemporaryDirectory(prefix="rlhf-cluster-") as scratch:
        inputs = check_inputs(config, Path(scratch))
        with connected(config) as address:
            preflight(demand(config))
            with RunDir.create(
                config.run_dir, config, overwrite=overwrite, argv=overrides_argv
            ) as rundir:
                inputs = _move_in(inputs, config, rundir)
                write_json(rundir.path / "control.json", {"ray_address": address})
                console = Console()
                live = config.observe.live and console.is_terminal
                with LiveView(console, live=live) as view:
                    run = _Run(config, inputs, rundir, view, engine_factory, started)
                    return asyncio.run(run.supervised())


def _move_in(inputs: Inputs, config: RunConfig, rundir: RunDir) -> Inputs:
    """A made model belongs to the run."""
    if config.model.init is None:
        return inputs
    shutil.copytree(inputs.model_dir, rundir.model)
    return replace(inputs, model_dir=rundir.model)


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """The same run with folders that mean the same in every process."""
    run = config.run.model_copy(update={"root": str(Path(config.run.root).absolute())})
    weights = config.weights
    if weights.root is not None:
        weights = weights.model_copy(update={"root": str(Path(weights.root).absolute())})
    return config.model_copy(update={"run": run, "weights": weights})


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
        self.sync: WeightSync | None = None

    async def supervised(self) -> dict[str, Any]:
        """`_run`, ended early by SIGTERM or SIGINT; the outcome is in the run directory."""
        task = asyncio.ensure_future(self._run())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        try:
            return await task
        except asyncio.CancelledError:
            raise RunError(
                f"run {self.config.run.name!r} was stopped by a signal; its metrics and published "
                f"weights are in {self.rundir.path}"
            ) from None
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    async def _run(self) -> dict[str, Any]:
        control = start_control(self.config)
        pools = (generation_pool(self.launcher), scoring_pool(self.launcher))
        observer = RunObserver(
            self.config,
            self.rundir,
            [pool for pool, _ in pools],
            lambda: self.sync.stats if self.sync else SyncStats(),
            self.view.update,
            self.started,
        )
        try:
            observer.state("starting")
            async with self._services(pools, observer) as services:
                supervisor = Supervisor(control, services.pools, services.buffer, observer)
                async with supervisor.watching():
                    summary = await self._train(services, observer)
            observer.state("finished")
            return summary
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError)
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
        """All services, started side by side, with the warm-up done and version 0 live."""
        (generation, generation_port), (scoring, scoring_port) = pools
        others: list[tuple[Any, Any]] = []
        try:
            async with asyncio.TaskGroup() as starts:
                learner_start = starts.create_task(self._start_learner(others, observer))
                buffer_start = starts.create_task(start_buffer(self.launcher, others))
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
        for step, examples in enumerate(self.inputs.warmup_batches(), start=1):
            observer.warmup(step, await learner.sft_step(examples))
        return learner

    async def _train(self, services: Services, observer: RunObserver) -> dict[str, Any]:
        config = self.config
        timeout_s = config.weights.publish_timeout_s + config.generation.pull_timeout_s
        self.sync = WeightSync(
            services.learner,
            services.generation,
            services.buffer,
            config.weights.publish_every,
            time.monotonic,
        )
        await self.sync.after_step(0)
        await self.sync.drain(timeout_s)
        if config.scoring.reference and config.sft.steps:
            assert self.sync.last is not None
            reference = export_hf(
                self.sync.last, self.inputs.model_dir, self.rundir.path / "reference"
            )
            await services.scoring.use_reference(str(reference))
        before = await self._evaluate(services, observer, 0)
        pipeline = Pipeline(
            generation=services.generation,
            scoring=services.scoring,
            buffer=services.buffer,
            learner=services.learner,
            sync=self.sync,
            prompts=self.inputs.prompts,
            observer=observer,
            sampling=Sampling(
                num_samples=config.algorithm.group_size,
                temperature=config.generation.temperature,
                max_tokens=config.generation.max_response_tokens,
            ),
            num_steps=config.run.steps,
            groups_per_step=config.run.groups_per_step,
            max_error_rate=config.scoring.max_error_rate,
            live_timeout_s=timeout_s,
        )
        await pipeline.run()
        await self.sync.publish_last(config.run.steps, timeout_s)
        after = await self._evaluate(services, observer, config.run.steps)
        return self._finish(observer, before, after)

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
