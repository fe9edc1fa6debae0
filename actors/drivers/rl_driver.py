"""Driver of reinforcement learning: one run from its configuration to its result.

    check inputs -> Ray -> preflight -> run directory
        -> pools                      for the whole run
        -> learner and buffer         warm-up -> training; again after a failure of one of them
        -> export -> summary

If the run directory has a checkpoint, the learner loads it instead of the warm-up, and its version goes
live instead of version 0. The same happens when a learner rank or the buffer fails
(`rlhf_cluster.run.restarts`); process and pools then stay.

Promises:
- errors in the input are reported before anything starts;
- however the run ends, all its actors and placement groups are removed, and the run directory says how
  it ended;
- a run that is asked to end does so at the next boundary between two steps, with a checkpoint.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from typing import Any

from actors.cluster.ray_cluster import describe_demand
from rlhf_cluster.util.slow_disk import run_in_thread

# isort: split
from actors.cluster.signals import ended_by_signals
from actors.drivers.checkpoint_cut import checkpoint_metrics
from actors.drivers.open_run import in_run_directory
from actors.drivers.rl_observer import RunObserver
from actors.drivers.supervisor import (
    Supervisor,
    look_at_buffer,
)
from actors.drivers.training_attempt import (
    Attempt,
    Place,
    Stopped,
    stopped_text,
)
from actors.services.hot_spare_actors import learner_spares
from actors.services.learner_actors import RayLearner
from actors.services.learner_core import Core, core_restarts
from actors.services.start_services import (
    Launcher,
    control_channel,
    environment_of_engine,
    generation_pool,
    scoring_pools,
    started_pools,
)
from actors.weights.transports import Transport
from rlhf_cluster.buffer.buffer import trim_to_bound
from rlhf_cluster.buffer.staleness import build_gate
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.check_scoring import kl_notes
from rlhf_cluster.config.pools import pool_sections
from rlhf_cluster.errors import CoreLost, PlacementError, PoolLost, RlhfError, StalledError
from rlhf_cluster.generation.generation_worker import DEFAULT_ENGINE
from rlhf_cluster.learner.hot_spares import rank_of
from rlhf_cluster.observe.record.logs import configure
from rlhf_cluster.observe.report.live_view import LiveView
from rlhf_cluster.planning.choose_transport import with_transport
from rlhf_cluster.planning.run_inputs import (
    Inputs,
    check_inputs,
)
from rlhf_cluster.planning.start_deadline import with_start_deadline
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.run.autoscaler import Autoscaler
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint
from rlhf_cluster.run.checkpoint.resume import Continuation
from rlhf_cluster.run.control_channel import ControlChannel
from rlhf_cluster.run.restarts import (
    find_restart_checkpoint,
    with_recovery,
)
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.worker_pool import WorkerPool
from rlhf_cluster.weights.formats.huggingface import export_hf
from rlhf_cluster.weights.sync import SyncStats

log = logging.getLogger(__name__)


def run_config(
    config: RunConfig,
    overrides_argv: list[str],
    overwrite: bool,
    engine_factory: str = DEFAULT_ENGINE,
    accept_changes: bool = False,
) -> dict[str, Any]:
    """Run `config` to its end, from the last checkpoint if there is one.

    Returns the summary, at once for a run that has finished; raises the `RlhfError` that ended it.
    """
    config = config.with_absolute_paths()
    started = time.time()

    def run(inputs: Inputs, rundir: RunDir, view: LiveView, found: Continuation) -> dict[str, Any]:
        chosen = with_start_deadline(with_transport(config, inputs.model_dir), inputs.model_dir)
        own = _Run(chosen, inputs, rundir, view, engine_factory, started)
        own.checkpoint = found.checkpoint
        own.patience_s = config.cluster.placement_timeout_s if found.notes else 0.0
        return asyncio.run(own.supervised())

    return in_run_directory(
        config,
        overrides_argv,
        overwrite,
        accept_changes,
        lambda scratch: check_inputs(config, scratch),
        lambda inputs: kl_notes(config),
        run,
    )


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
            engine_environment=environment_of_engine(config, engine_factory),
        )
        self.checkpoint: Checkpoint | None = None  # from which the run resumes
        self.patience_s = 0.0  # seconds for Ray to end the actors of an earlier process
        self.attempt: Attempt | None = None  # the current one
        self.restarts = core_restarts(config)
        self.num_ranks = 0
        self.lost: frozenset[int] = frozenset()  # ranks that failed in the previous attempt
        self.spares = learner_spares(self.launcher, lambda text: self.observer.event(text))
        self.pools: tuple[WorkerPool, ...]
        self.place: Place
        self.observer: RunObserver

    async def supervised(self) -> dict[str, Any]:
        """Run to the end, or until SIGTERM or SIGINT; the outcome is in the run directory.

        The first signal ends the run at the next boundary between two steps. After
        `checkpoint.notice_s`, or at a second signal, the run ends at once.
        """
        stops: list[asyncio.Task[None]] = []

        def stop() -> bool:
            attempt = self.attempt
            if attempt is None or attempt.pipeline is None:
                return False
            stops.append(asyncio.create_task(attempt.stop()))
            return True

        try:
            return await ended_by_signals(
                self._run(),
                stop,
                self.config.checkpoint.notice_s,
                lambda: stopped_text(self.config, self._last_checkpoint),
            )
        finally:
            for request in stops:
                request.cancel()

    @property
    def _last_checkpoint(self) -> int:
        """Step of the last complete checkpoint, -1 before the first."""
        if self.attempt is not None and self.attempt.checkpoints is not None:
            return self.attempt.checkpoints.stats.last
        return -1 if self.checkpoint is None else self.checkpoint.state.step

    async def _run(self) -> dict[str, Any]:
        control = await run_in_thread(
            control_channel, self.config, self.patience_s, lambda text: self.observer.event(text)
        )
        generation, scoring = generation_pool(self.launcher), scoring_pools(self.launcher)
        self.pools = (generation[0], *scoring[0])
        observer = self.observer = await run_in_thread(
            self._observer,
            lambda: {
                **generation[1].metrics(),
                **scoring[1].metrics(),
                **checkpoint_metrics(self.attempt.checkpoints if self.attempt else None),
                "learner/restarts_total": float(self.restarts.used),
                "learner/ranks": float(self.num_ranks),
                "learner/spares_ready": float(self.spares.num_ready),
                "control/restarts_total": float(control.restarts.total),
            },
        )
        for pool in self.pools:
            pool.tell = observer.event
        self.place = Place(
            config=self.config,
            inputs=self.inputs,
            rundir=self.rundir,
            observer=observer,
            generation=generation[1],
            scoring=scoring[1],
            transport=Transport(self.config),
            export=self._export,
            first_prompt=self.inputs.prompts.cursor,
        )
        try:
            observer.state("starting")
            if self.checkpoint is not None:
                await observer.resumed(self.checkpoint.state.step)
            summary = await self._train(self._supervisor(control))
            await observer.finished()
            return summary
        except BaseException as error:
            stopped = isinstance(error, asyncio.CancelledError | Stopped)
            observer.state("stopped" if stopped else "failed", str(error) or type(error).__name__)
            if not stopped:
                await observer.post_mortem(error)
            if isinstance(error, StalledError):
                causes = "; ".join(pool.describe_errors() for pool in self.pools)
                raise StalledError(f"{error}. {causes}") from error
            raise
        finally:
            control.close()
            await run_in_thread(observer.close)

    def _observer(self, further: Callable[[], Mapping[str, float]]) -> RunObserver:
        return RunObserver(
            self.config,
            self.rundir,
            self.pools,
            lambda: self.attempt.sync.stats if self.attempt else SyncStats(),
            self.view.update,
            self.started,
            further=further,
        )

    def _supervisor(self, control: ControlChannel) -> Supervisor:
        config = self.config
        gpus = {pool: section.num_gpus for pool, section in pool_sections(config).items()}
        scaler = None if config.autoscale is None else Autoscaler(config.autoscale, gpus)
        return Supervisor(control, self.pools, self.observer, scaler)

    async def _train(self, supervisor: Supervisor) -> dict[str, Any]:
        """Train to the end with one set of pools, and return the run's summary.

        Learner and buffer are started again after each failure that the run recovers from.
        """
        async with (
            self.place.transport.serving(),
            self.spares.kept(),
            started_pools(self.config, self.pools) as started,
            supervisor.watching(started),
        ):
            before, after = await with_recovery(
                lambda: self._attempt(started),
                self._recover,
                self.restarts,
                self.observer.event,
            )
            return await self.observer.on_disk(self._finish, before, after)

    async def _attempt(self, started: asyncio.Future[None]) -> tuple[float | None, float | None]:
        """Train with one learner and one buffer, until training ends or one of them fails.

        Returns the held-out rewards before and after training.
        """
        state, again = self.checkpoint and self.checkpoint.state, self.restarts.used > 0
        may_shrink = again and self.config.learner.on_loss == "shrink"
        core = Core(
            self.launcher, may_shrink, self.observer.event, spares=self.spares, lost=self.lost
        )
        try:
            buffered = state and trim_to_bound(state.buffer, build_gate(self.config))
            learner, buffer = await core.start(buffered, self._prepare)
            self.num_ranks = core.num_ranks
            self.spares.resume()
            async with core.watched(look_at_buffer(buffer, self.observer)):
                try:
                    await asyncio.shield(started)
                except PlacementError as error:
                    if not again:
                        raise
                    # A pool starts once, so it will not get these resources later.
                    raise PoolLost(f"a pool did not start: {error}") from error
                self.attempt = Attempt(
                    place=self.place,
                    learner=learner,
                    buffer=buffer,
                    checkpoint=self.checkpoint,
                    again=again,
                )
                return await self._train_attempt(self.attempt, core)
        except RlhfError as error:
            await self.observer.look_at_processes()
            loss = await core.loss_behind(error)
            if loss is error:
                raise
            raise loss from error
        finally:
            core.take_down()

    async def _train_attempt(
        self, attempt: Attempt, core: Core
    ) -> tuple[float | None, float | None]:
        """Train, and with fewer ranks than configured look for resources for the others meanwhile."""
        if core.num_ranks == self.config.learner.ranks:
            return await attempt.train()
        growing = asyncio.create_task(attempt.grow(core.room_to_grow))
        try:
            return await attempt.train()
        finally:
            growing.cancel()
            await asyncio.gather(growing, return_exceptions=True)

    async def _prepare(self, learner: RayLearner) -> None:
        """Set the weights of a new learner: load the checkpoint, or run the warm-up."""
        if self.checkpoint is not None:
            await learner.load_state(self.checkpoint.learner, self.checkpoint.state.learner)
            return
        for step, examples in enumerate(self.inputs.warmup_batches(), start=1):
            self.observer.warmup(step, await learner.sft_step(examples))

    async def _recover(self, lost: RlhfError) -> None:
        """End everything of the failed attempt, and choose the checkpoint from which the run resumes.

        Raises: `Stopped` if the run was asked to end.
        """
        attempt = self.attempt
        stopped = attempt is not None and attempt.pipeline is not None and attempt.pipeline.stopped
        if attempt is not None and stopped and not attempt.growing:
            raise Stopped(f"{stopped_text(self.config, self._last_checkpoint)}. {lost}") from lost
        self.attempt = None
        self.lost = rank_of(lost.process) if isinstance(lost, CoreLost) else frozenset()
        self.observer.state("recovering")
        if attempt is not None:
            await attempt.abandon()
        await self.place.generation.begin_anew()
        await self.place.scoring.begin_anew()
        self.checkpoint = await run_in_thread(
            find_restart_checkpoint, self.rundir, self.config, lost
        )
        step = None if self.checkpoint is None else self.checkpoint.state.step
        self.observer.recovering(lost, self.restarts.used, self.restarts.limit, step)

    def _export(self, version: WeightVersion) -> None:
        final = self.rundir.final
        if final.exists():  # left by an attempt that failed after the last step
            shutil.rmtree(final)
        export_hf(version, self.inputs.model_dir, final)

    def _finish(self, before: float | None, after: float | None) -> dict[str, Any]:
        from rlhf_cluster.observe.report.learning_curve import draw_curve

        draw_curve(self.observer.records(), self.rundir.curve, self.config.run.name)
        summary = {
            "run": self.config.run.name,
            "run_dir": str(self.rundir.path),
            "steps": self.config.run.steps,
            "reward_before": before,
            "reward_after": after,
            "first_step_s": self.observer.first_step_s,
            "total_s": time.time() - self.started,
            "final_model": str(self.rundir.final),
            "demand": describe_demand(self.config),
        }
        self.rundir.write_summary(summary)
        return summary
