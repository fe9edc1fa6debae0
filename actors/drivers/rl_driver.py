"""Driver of reinforcement learning: one run from its configuration to its result.

    pools                      for the whole run
        -> learner and buffer  warm-up -> training; again after a failure of one of them
        -> export -> summary

If the run directory has a checkpoint, the learner loads it instead of the warm-up, and its version goes
live instead of version 0. The same happens when a learner rank or the buffer fails
(`rlhf_cluster.run.restarts`); process and pools then stay.

Promise: however the run ends, all its actors and placement groups are removed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.drivers.driver import Opened, TrainingDriver
from rlhf_cluster.util.slow_disk import run_in_thread

# isort: split
from actors.drivers.checkpoint_cut import checkpoint_metrics
from actors.drivers.rl_observer import RunObserver
from actors.drivers.supervisor import Supervisor, look_at_buffer
from actors.drivers.training_attempt import Attempt, Place
from actors.services.control_actor import ControlChannel, open_channel
from actors.services.hot_spare_actors import learner_spares, rank_of
from actors.services.learner_core import Core
from actors.services.rank_actors import RayLearner
from actors.services.start_services import generation_pool, scoring_pools, started_pools
from actors.weights.transports import Transport
from rlhf_cluster.buffer.buffer import trim_to_bound
from rlhf_cluster.buffer.staleness import build_gate
from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.check_scoring import kl_notes
from rlhf_cluster.config.pools import pool_sections
from rlhf_cluster.errors import CoreLost, PlacementError, PoolLost, RlhfError, StalledError
from rlhf_cluster.planning.model_settings import with_transport
from rlhf_cluster.planning.run_inputs import Inputs, check_inputs
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.run.autoscaler import Autoscaler
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.worker_pool import WorkerPool
from rlhf_cluster.weights.formats.huggingface import export_hf
from rlhf_cluster.weights.sync import SyncStats

log = logging.getLogger(__name__)


class RLDriver(TrainingDriver[RunConfig, Inputs, RunObserver]):
    """A run of reinforcement learning."""

    def __init__(self, opened: Opened[RunConfig, Inputs]) -> None:
        chosen = with_transport(opened.config, opened.inputs.model_dir)
        super().__init__(replace(opened, config=chosen))
        self.attempt: Attempt | None = None  # the current one
        self.num_ranks = 0
        self.lost: frozenset[int] = frozenset()  # ranks that failed in the previous attempt
        self.spares = learner_spares(self.launcher, lambda text: self.observer.event(text))
        self.control: ControlChannel
        self.pools: tuple[WorkerPool, ...]
        self.place: Place

    @staticmethod
    def check_inputs(config: RunConfig, scratch: Path) -> Inputs:
        return check_inputs(config, scratch)

    @staticmethod
    def notes(config: RunConfig, inputs: Inputs) -> Sequence[str]:
        return kl_notes(config)

    @property
    def checkpoints(self) -> Checkpoints | None:
        return None if self.attempt is None else self.attempt.checkpoints

    def ask_to_stop(self) -> bool:
        if self.attempt is None or self.attempt.pipeline is None:
            return False
        self.stopping = True
        self._stopped = asyncio.create_task(self.attempt.stop())  # kept until it is done
        return True

    async def open(self) -> None:
        control = self.control = await run_in_thread(
            open_channel, self.config, self.patience_s, lambda text: self.observer.event(text)
        )
        generation, scoring = generation_pool(self.launcher), scoring_pools(self.launcher)
        self.pools = (generation[0], *scoring[0])
        observer = self.observer = await run_in_thread(
            self._observer,
            lambda: {
                **generation[1].metrics(),
                **scoring[1].metrics(),
                **checkpoint_metrics(self.checkpoints),
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

    def close(self) -> None:
        self.control.close()
        super().close()

    def explain(self, error: BaseException) -> BaseException:
        """Add the last errors of the pools to a `StalledError`: they may be its cause."""
        if not isinstance(error, StalledError):
            return error
        causes = "; ".join(pool.describe_errors() for pool in self.pools)
        return StalledError(f"{error}. {causes}")

    async def work(self) -> dict[str, Any]:
        async with (
            self.place.transport.serving(),
            self.spares.kept(),
            started_pools(self.config, self.pools) as self.started,
            self._supervisor().watching(self.started),
        ):
            before, after = await self.train_with_restarts()
            return await self.observer.on_disk(self._finish, before, after)

    def make_core(self) -> Core:
        may_shrink = self.again and self.config.learner.on_loss == "shrink"
        return Core(
            self.launcher, may_shrink, self.observer.event, spares=self.spares, lost=self.lost
        )

    async def train(self, core: Core) -> tuple[float | None, float | None]:
        """Train with one learner and one buffer, until training ends or one of them fails.

        Returns the held-out rewards before and after training.
        """
        state = self.checkpoint and self.checkpoint.state
        buffered = state and trim_to_bound(state.buffer, build_gate(self.config))
        learner, buffer = await core.start(buffered, self._prepare)
        self.num_ranks = core.num_ranks
        self.spares.resume()
        async with core.watched(look_at_buffer(buffer, self.observer)):
            try:
                await asyncio.shield(self.started)
            except PlacementError as error:
                if not self.again:
                    raise
                # A pool starts once, so it will not get these resources later.
                raise PoolLost(f"a pool did not start: {error}") from error
            self.attempt = Attempt(
                place=self.place,
                learner=learner,
                buffer=buffer,
                checkpoint=self.checkpoint,
                again=self.again,
            )
            return await self._train_attempt(self.attempt, core)

    async def abandon(self, lost: RlhfError) -> None:
        attempt, self.attempt = self.attempt, None
        self.lost = rank_of(lost.process) if isinstance(lost, CoreLost) else frozenset()
        if attempt is not None:
            await attempt.abandon()
        await self.place.generation.begin_anew()
        await self.place.scoring.begin_anew()

    def _observer(self, further: Callable[[], Mapping[str, float]]) -> RunObserver:
        return RunObserver(
            self.config,
            self.rundir,
            self.pools,
            lambda: self.attempt.sync.stats if self.attempt else SyncStats(),
            self.show,
            self.started_s,
            further=further,
        )

    def _supervisor(self) -> Supervisor:
        config = self.config
        gpus = {pool: section.num_gpus for pool, section in pool_sections(config).items()}
        scaler = None if config.autoscale is None else Autoscaler(config.autoscale, gpus)
        return Supervisor(self.control, self.pools, self.observer, scaler)

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

    def _export(self, version: WeightVersion) -> None:
        final = self.rundir.final
        if final.exists():  # left by an attempt that failed after the last step
            shutil.rmtree(final)
        export_hf(version, self.inputs.model_dir, final)

    def _finish(self, before: float | None, after: float | None) -> dict[str, Any]:
        from rlhf_cluster.observe.report.learning_curve import draw_curve

        records = self.observer.records()
        draw_curve(records, self.rundir.curve, self.config.run.name)
        rewards = [r["reward/mean"] for r in records if r.get("reward/mean") is not None][-10:]
        return self.write_summary(
            steps=self.config.run.steps,
            reward_before=before,
            reward_after=after,
            reward_trained=sum(rewards) / len(rewards),
            final_model=str(self.rundir.final),
        )
