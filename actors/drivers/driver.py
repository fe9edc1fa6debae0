"""Driver of any run, from its configuration to its summary.

    check inputs -> Ray -> preflight -> run directory -> live view
        -> Driver.run: work -> summary
           TrainingDriver: (attempt -> recover)* -> finish

`rl_driver`, `offline_driver` and `dataset_driver` say what the work of each kind of run is.

Promises:
- errors in the input are reported before anything starts;
- a finished run is not changed;
- directory and cluster are released, however the run ends, and the run directory says how it ended;
- a run that is asked to end does so at the next boundary between two steps, with a checkpoint.
"""

from __future__ import annotations

import asyncio
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from actors.cluster.ray_cluster import connected, metrics_targets

# isort: split
import ray
from rich.console import Console

from actors.cluster.launch import preflight, resources_by_node
from actors.drivers.run_observer import Observer
from actors.services.learner_core import Core, core_restarts
from actors.services.start_services import Launcher, environment_of_engine
from rlhf_cluster.config import RunConfig, StageConfig
from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.errors import RlhfError, RunError
from rlhf_cluster.generation.generation_worker import DEFAULT_ENGINE
from rlhf_cluster.observe.record.logs import configure
from rlhf_cluster.observe.record.post_mortem import NAME, add_path_on_error
from rlhf_cluster.observe.report.live_view import LiveView
from rlhf_cluster.planning.model_settings import with_start_deadline
from rlhf_cluster.planning.placement import address_of, demand, judge_placement, total_resources
from rlhf_cluster.planning.run_inputs import Inputs, StageInputs
from rlhf_cluster.run.checkpoint import checkpoint_folder, resume
from rlhf_cluster.run.checkpoint.background_saving import Checkpoints
from rlhf_cluster.run.checkpoint.resume import Continuation
from rlhf_cluster.run.restarts import find_restart_checkpoint, with_recovery
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.util.durable_files import sync_tree, write_json
from rlhf_cluster.util.slow_disk import run_in_thread

T = TypeVar("T")
ConfigT = TypeVar("ConfigT", bound=AnyConfig)
InputsT = TypeVar("InputsT", Inputs, StageInputs)
ObserverT = TypeVar("ObserverT", bound=Observer[Any])


class Stopped(RunError):
    """End of a run that was asked to end, at a boundary between two steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened(Generic[ConfigT, InputsT]):
    """Checked inputs of a run, and its claimed directory."""

    config: ConfigT
    inputs: InputsT
    rundir: RunDir
    view: LiveView
    found: Continuation
    started_s: float  # unix time of the command
    engine_factory: str


class Driver(Generic[ConfigT, InputsT, ObserverT]):
    """One run in its claimed directory. Each subclass is one kind of run."""

    observer: ObserverT

    def __init__(self, opened: Opened[ConfigT, InputsT]) -> None:
        self.config, self.inputs, self.rundir = opened.config, opened.inputs, opened.rundir
        self.show, self.started_s = opened.view.update, opened.started_s
        configure("controller", "controller", self.rundir.logs)
        services = self.services_config
        # Ray needs some time to end the actors of an earlier process.
        self.patience_s = services.cluster.placement_timeout_s if opened.found.notes else 0.0
        self.launcher = Launcher(
            config=services,
            model_dir=str(self.inputs.model_dir),
            engine_factory=opened.engine_factory,
            engine_environment=environment_of_engine(services, opened.engine_factory),
        )

    @staticmethod
    def check_inputs(config: Any, scratch: Path) -> Any:
        """Check and return the inputs. A newly made model goes into the folder `scratch`."""
        raise NotImplementedError

    @staticmethod
    def notes(config: Any, inputs: Any) -> Sequence[str]:
        """Return notes about the inputs, which are printed for the user."""
        return ()

    @property
    def services_config(self) -> Any:
        """Configuration that the run's actors get."""
        return self.config

    async def open(self) -> None:
        """Start what must be there before the first record is written, the observer too."""

    async def work(self) -> dict[str, Any]:
        """Do all of the run, and return its summary."""
        raise NotImplementedError

    def cancel_tasks(self) -> None:
        """Cancel what still runs on the event loop when the run ends."""

    def close(self) -> None:
        """Release what `open` started. Blocks on the files of the run, in a thread."""
        self.observer.close()

    def ask_to_stop(self) -> bool:
        """End the run at its next boundary. Returns False if it has none, and has to end at once."""
        return False

    def stopped_text(self) -> str:
        """Return the message of a run that a signal ended."""
        raise NotImplementedError

    def explain(self, error: BaseException) -> BaseException:
        """Return the error that is raised for `error`, which ended the run."""
        return error

    async def supervise(self) -> dict[str, Any]:
        """Run to the end, or until SIGTERM or SIGINT; the outcome is in the run directory.

        The first signal ends the run at the next boundary between two steps. After
        `checkpoint.notice_s`, or at a second signal, the run ends at once.
        """
        notice_s = self.services_config.checkpoint.notice_s
        return await ended_by_signals(self.run(), self.ask_to_stop, notice_s, self.stopped_text)

    async def run(self) -> dict[str, Any]:
        """Run to the end, with records of how it ended. Returns the summary."""
        await self.open()
        observer = self.observer
        try:
            observer.state("starting")
            summary = await self.work()
            await observer.finished()
            return summary
        except BaseException as error:
            cancelled = isinstance(error, asyncio.CancelledError)
            stopped = cancelled or isinstance(error, Stopped)
            text = str(error) or (self.stopped_text() if cancelled else type(error).__name__)
            observer.state("stopped" if stopped else "failed", text)
            if not stopped:
                await observer.post_mortem(error)
            if (explained := self.explain(error)) is not error:
                raise explained from error
            raise
        finally:
            self.cancel_tasks()
            await run_in_thread(self.close)

    def write_summary(self, **facts: Any) -> dict[str, Any]:
        """Write and return the summary of a finished run: `facts`, and what every run has."""
        summary = {
            "run": self.config.run.name,
            "run_dir": str(self.rundir.path),
            **facts,
            "first_step_s": self.observer.first_step_s,
            "total_s": time.time() - self.started_s,
            "demand": total_resources(demand(self.config)),
        }
        self.rundir.write_summary(summary)
        return summary


class TrainingDriver(Driver[ConfigT, InputsT, ObserverT]):
    """A run with checkpoints, which resumes from the newest after each failure of its core.

    The core is what a checkpoint restores: learner ranks and buffer. An attempt is the training with
    one core.
    """

    config: Any

    def __init__(self, opened: Opened[Any, InputsT]) -> None:
        super().__init__(opened)
        self.checkpoint = opened.found.checkpoint  # from which the next attempt resumes
        self.stopping = False
        self.restarts = core_restarts(self.config)

    @property
    def checkpoints(self) -> Checkpoints | None:
        """Checkpoints of the current attempt; None until it trains."""
        raise NotImplementedError

    @property
    def again(self) -> bool:
        """Whether an earlier attempt of this process failed."""
        return self.restarts.used > 0

    def make_core(self) -> Core:
        """Build the core of the next attempt, which has no process yet."""
        raise NotImplementedError

    async def train(self, core: Any) -> Any:
        """Train with `core` to the end of the run. Returns what `work` needs for the summary."""
        raise NotImplementedError

    async def abandon(self, lost: RlhfError) -> None:
        """End everything of the failed attempt, its checkpoints too."""
        raise NotImplementedError

    def cancel_tasks(self) -> None:
        if self.checkpoints is not None:
            self.checkpoints.close()

    def stopped_text(self) -> str:
        last = -1 if self.checkpoint is None else self.checkpoint.state.step
        if self.checkpoints is not None:
            last = self.checkpoints.stats.last
        return stopped_text(self.config, last)

    async def train_with_restarts(self) -> Any:
        """Train to the end, with a new core after each failure that the run recovers from."""
        if self.checkpoint is not None:
            await self.observer.resumed(self.checkpoint.state.step)
        return await with_recovery(self._attempt, self._recover, self.restarts, self.observer.event)

    async def _attempt(self) -> Any:
        core = self.make_core()
        try:
            return await self.train(core)
        except RlhfError as error:
            await self.observer.look_at_processes()
            loss = await core.loss_behind(error)
            if loss is error:
                raise
            raise loss from error
        finally:
            core.take_down()

    async def _recover(self, lost: RlhfError) -> None:
        """End everything of the failed attempt, and choose the checkpoint from which the run resumes.

        Raises: `Stopped` if the run was asked to end.
        """
        if self.stopping:
            raise Stopped(f"{self.stopped_text()}. {lost}") from lost
        self.observer.state("recovering")
        await self.abandon(lost)
        self.checkpoint = await run_in_thread(
            find_restart_checkpoint, self.rundir, self.config, lost
        )
        step = None if self.checkpoint is None else self.checkpoint.state.step
        self.observer.recovering(lost, self.restarts.used, self.restarts.limit, step)


def drive(
    kind: type[Driver[Any, Any, Any]],
    config: AnyConfig,
    argv: list[str],
    overwrite: bool,
    accept_changes: bool,
    engine_factory: str = DEFAULT_ENGINE,
) -> dict[str, Any]:
    """Run `config` to its end with a driver of `kind`, from the last checkpoint if there is one.

    Returns the summary, at once for a run that has finished; raises the `RlhfError` that ended it.
    """
    started_s, config = time.time(), config.with_absolute_paths()
    there = resume.standing(config, overwrite, accept_changes)
    if there is not None and there.finished:
        return RunDir.open(config.run_dir).read_summary()
    with tempfile.TemporaryDirectory(prefix="rlhf-cluster-") as scratch:
        inputs = kind.check_inputs(config, Path(scratch))
        with connected(config) as address:
            preflight(demand(config), config.cluster.node_timeout_s)
            rundir, found = claim(config, argv, overwrite, accept_changes)
            with rundir:
                if found.finished:
                    return rundir.read_summary()
                inputs = _move_in(inputs, config, rundir)
                facts = {"ray_address": address, "metrics": metrics_targets()}
                write_json(rundir.path / "control.json", facts)
                console = Console()
                for note in [*found.notes, *kind.notes(config, inputs), *_waits_for(config)]:
                    console.print(note, markup=False, highlight=False, soft_wrap=True)
                live = config.observe.live and console.is_terminal
                with add_path_on_error(rundir.path / NAME), LiveView(console, live=live) as view:
                    opened = Opened(
                        config=with_start_deadline(config, inputs.model_dir),
                        inputs=inputs,
                        rundir=rundir,
                        view=view,
                        found=found,
                        started_s=started_s,
                        engine_factory=engine_factory,
                    )
                    return asyncio.run(kind(opened).supervise())


def stopped_text(config: RunConfig | StageConfig, last: int) -> str:
    """Return the message of a stopped run.

    Args:
        last: step of the last complete checkpoint, -1 if there is none.
    """
    next_step = f"The same command continues it from step {last}" if last >= 0 else "No checkpoint"
    return (
        f"run {config.run.name!r} was stopped by a signal; its metrics and published weights are in "
        f"{config.run_dir}. {next_step}"
    )


def claim(
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


def _waits_for(config: AnyConfig) -> list[str]:
    """Return a note if the run has to wait for resources of an existing cluster, else []."""
    if address_of(config) is None:
        return []
    found = judge_placement(
        demand(config),
        resources_by_node(),
        ray.available_resources(),
        config.cluster.node_timeout_s,
    )
    return [] if found.verdict == "ok" else [f"waiting: {found.value}. {found.cure}"]


def _move_in(inputs: InputsT, config: AnyConfig, rundir: RunDir) -> InputsT:
    """Copy a newly made model into the run directory, unless the run has one already."""
    if config.model.init is None:
        return inputs
    if not rundir.model.exists():
        _copy_whole(inputs.model_dir, rundir.model)
    return replace(inputs, model_dir=rundir.model)


def _copy_whole(source: Path, target: Path) -> None:
    """Copy a folder so that `target` only exists once the copy is complete.

    A partial copy that a crash has left is removed first.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial)
    sync_tree(partial)
    partial.rename(target)


async def ended_by_signals(
    run: Coroutine[Any, Any, T],
    stop: Callable[[], bool],
    notice_s: float,
    text: Callable[[], str],
) -> T:
    """Await `run`, let signals end it, and return its result.

    The first signal calls `stop`, which returns whether the run will end itself. If so, the run has
    `notice_s` for that.

    Raises: `RunError` of `text`, when the run is cancelled: after `notice_s`, at a second signal, or
    where `stop` returns False.
    """
    task = asyncio.ensure_future(run)
    loop = asyncio.get_running_loop()
    asked: list[asyncio.TimerHandle] = []

    def on_signal() -> None:
        if asked or not stop():
            task.cancel()
        else:
            asked.append(loop.call_later(notice_s, task.cancel))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    try:
        return await task
    except asyncio.CancelledError:
        raise RunError(text()) from None
    finally:
        for handle in asked:
            handle.cancel()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
