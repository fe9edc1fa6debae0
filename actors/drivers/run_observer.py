"""Records of any run by its driver: metrics.jsonl, status.json, events, a post-mortem.

Everything is written when it happens; nothing waits for the disk unless its docstring says so.
Subclasses add their metrics: `RunObserver` for reinforcement learning, and here `StageObserver` for
an offline stage and for a data set.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from actors.cluster import stacks_of_nodes
from actors.cluster.ray_metrics import RayMetrics
from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import RlhfError, StalledError
from rlhf_cluster.observe.record import post_mortem
from rlhf_cluster.observe.record.run_log import RunLog, StatusFile
from rlhf_cluster.observe.report.learning_curve import held_out_name
from rlhf_cluster.observe.sinks import open_sinks
from rlhf_cluster.records import StepReport
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Event, Record, Snapshot, State, read_metrics
from rlhf_cluster.util.slow_disk import DiskDeadline, run_in_thread

log = logging.getLogger(__name__)  # its messages are the events of a report: see read_run.py

MAX_EVENTS = 6
PACE_STEPS = 10  # over which the time left is predicted

T = TypeVar("T")

C = TypeVar("C", RunConfig, StageConfig | GenerateConfig)


class Observer(Generic[C]):
    """Writer of a run's records.

    Args:
        show: gets every new snapshot.
        started_s: unix time at which the command was given.
        shown: further fields of the first snapshot.
    """

    noun = "run"

    def __init__(
        self,
        config: C,
        rundir: RunDir,
        show: Callable[[Snapshot], None],
        started_s: float,
        clock: Callable[[], float],
        num_steps: int,
        **shown: Any,
    ) -> None:
        self._config, self._rundir, self._show = config, rundir, show
        self._num_steps = num_steps
        self._clock, self._started_s = clock, started_s
        self.patience = patience = DiskDeadline(
            limit_s=config.observe.write_timeout_s,
            setting="observe.write_timeout_s",
            told_fraction=config.observe.slow_write_fraction,
        )
        self._log = RunLog(rundir, open_sinks(config, rundir.path, self.event), patience)
        self._status = StatusFile(rundir, patience)
        self._metrics = RayMetrics("controller", {"run": config.run.name})
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._stacks: dict[str, list[str]] = {}  # stacks of the other processes at the last failure
        self._pace: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)  # step, unix time
        self.first_step_s: float | None = None
        self.packages: dict[str, str | None] = json.loads(rundir.environment.read_text())[
            "packages"
        ]
        """Versions of the packages with which the run was started."""
        self.snapshot = Snapshot(
            run=config.run.name,
            state="starting",
            step=0,
            num_steps=num_steps,
            time_s=started_s,
            **shown,
        )

    def event(self, text: str) -> None:
        """Log an event and show it in the status, such as a restart, a discard, a scaling."""
        self._tell(text)

    def state(self, state: State, error: str | None = None, **changes: Any) -> None:
        log.info("%s%s", state, f": {error}" if error else "")
        self._update(state=state, error=error, **changes)

    async def finished(self) -> None:
        """Complete the records of a run that has ended, and set its state.

        Raises: `RunError`.
        Waits for: the lines that are not yet written, at most their deadline.
        """
        await run_in_thread(self._log.flush)
        self.state("finished")

    def records(self) -> list[Record]:
        """Return all metric records of the run. Blocks and raises like `RunLog.flush`."""
        self._log.flush()
        return read_metrics(self._rundir.metrics)

    async def on_disk(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call `call`, which reads or writes the run directory, in a thread; returns its result.

        Raises: `StalledError` after `observe.write_timeout_s`.
        Waits for: the call.
        """
        what = f"{getattr(call, '__name__', 'a file').strip('_')} in {self._rundir.path}"
        return await self.patience.aside(what, call, *arguments)

    async def resumed(self, step: int) -> None:
        """Record that the run resumes after `step` steps, which its records contain already."""
        await self.on_disk(self._read_log)
        self._update(step=step, checkpoint=step)
        self.event(f"continues from the checkpoint of step {step}")

    def checkpointed(self, step: int) -> None:
        """Record that the checkpoint of `step` is complete."""
        log.info("checkpoint of step %d is complete", step)
        self._update(checkpoint=step)

    def recovering(self, lost: RlhfError, restart: int, limit: int, step: int | None) -> None:
        """Record a failure of the learner or the buffer, and the restart that follows.

        The run resumes from the checkpoint of `step`, or from the beginning if it is None.
        """
        where = "from the beginning" if step is None else f"from its checkpoint of step {step}"
        text = f"{lost}: the {self.noun} goes on {where}, restart {restart} of {limit}"
        self._tell(text, state="recovering", restarts=restart)

    async def cut_back(self, checkpoint: Checkpoint | None) -> None:
        """Delete the records of the steps after `checkpoint`, or of all steps without one."""
        await self.on_disk(self._cut_files, checkpoint)
        step = None if checkpoint is None else checkpoint.state.step
        self._update(step=step or 0, checkpoint=step)

    def _cut_files(self, checkpoint: Checkpoint | None) -> None:
        self._log.cut(lambda: resume.cut_back(self._rundir, checkpoint))
        self._read_log()

    def _read_log(self) -> None:
        """Set counters over steps from the metric records. Subclasses that have some override it."""

    async def look_at_processes(self) -> None:
        """Collect the stacks of all processes, before failed ones are taken down. Raises nothing."""
        self._stacks = await stacks_of_nodes.of_every_process(self._rundir.logs)

    async def post_mortem(self, error: BaseException) -> None:
        """Write a post-mortem of the run that `error` ends. Raises nothing."""

        def document() -> dict[str, Any]:
            return post_mortem.describe(
                time_s=self._clock(),
                run=self.snapshot.run,
                error=error,
                status=json.loads(self.snapshot.to_json()),
                services=self._services(),
                logs=post_mortem.read_tails(self._rundir.logs),
                stacks={**post_mortem.own_stacks(), "processes": self._stacks},
                config=self._config.model_dump(mode="json"),
                packages=self.packages,
                variables=os.environ,
            )

        try:
            await self.on_disk(post_mortem.write, self._rundir.path / post_mortem.NAME, document)
        except StalledError as stalled:  # `error`, which ends the run, matters more
            log.error("no post-mortem: %s", stalled)

    def close(self) -> None:
        self._log.close()
        self._status.close()

    def _services(self) -> Mapping[str, Any]:
        """Return the last reports of the services by name, for the post-mortem."""
        return {}

    def _note_first_step(self, now: float) -> None:
        if self.first_step_s is None:
            self.first_step_s = now - self._started_s

    def _time_left(self, step: int, now: float, step_s: float) -> float:
        """Predict the seconds to the last step, from the wall time of the last `PACE_STEPS` steps."""
        if self._pace and self._pace[-1][0] != step - 1:  # a restart went back
            self._pace.clear()
        self._pace.append((step, now))
        first, first_s = self._pace[0]
        each_s = (now - first_s) / (step - first) if step > first else step_s
        return max(0, self._num_steps - step) * each_s

    def _tell(self, text: str, **changes: Any) -> None:
        log.info(text)
        self._events.append(Event(time_s=self._clock(), text=text))
        self._update(**changes)

    def _update(self, **changes: Any) -> None:
        now = self._clock()
        self.snapshot = replace(
            self.snapshot,
            time_s=now,
            elapsed_s=now - self._started_s,
            events=tuple(self._events),
            **changes,
        )
        self._status.show(self.snapshot)
        self._show(self.snapshot)


class StageObserver(Observer[StageConfig | GenerateConfig]):
    """Observer of a stage. `headline` is the metric that status and screen show."""

    noun = "stage"

    def __init__(
        self,
        config: StageConfig | GenerateConfig,
        rundir: RunDir,
        num_steps: int,
        headline: str,
        constants: Mapping[str, float],
        show: Callable[[Snapshot], None],
        started_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._headline, self._constants = headline, constants
        shown = {"stage": config.stage.type, "metric": headline}
        super().__init__(config, rundir, show, started_s, clock, num_steps, **shown)

    def step(
        self,
        report: StepReport,
        units: Sequence[Unit],
        step_s: float,
        further: Mapping[str, float],
    ) -> None:
        num_tokens = float(sum(s.num_inputs for unit in units for s in unit.sequences))
        own = {
            "stage/units": float(len(units)),
            "stage/tokens": num_tokens,
            "stage/step_s": step_s,
            "stage/tokens_per_s": num_tokens / step_s if step_s > 0 else 0.0,
            **self._constants,
            **further,
        }
        values = {**report.metrics, **own}
        self.progress(report.step, values, own["stage/tokens_per_s"], step_s)

    def progress(
        self, step: int, values: Mapping[str, float], tokens_per_s: float, step_s: float
    ) -> None:
        """Record that `step` is done.

        Args:
            values: metrics by name.
            tokens_per_s: tokens per second of wall time.
            step_s: wall time of one step.
        """
        now = self._clock()
        self._note_first_step(now)
        self._log.append(step, now, values)
        self._metrics.record(values)
        value = values.get(self._headline)
        log.info("step %d: %s %.4g, %.3g s", step, self._headline, value or 0.0, step_s)
        self._update(
            state="running",
            step=step,
            left_s=self._time_left(step, now, step_s),
            metric_value=value,
            tokens_per_s=tokens_per_s,
            step_s=step_s,
        )

    def evaluation(self, step: int, found: Mapping[str, float]) -> float | None:
        """Record one evaluation; returns its headline metric."""
        values = {held_out_name(name): value for name, value in found.items()}
        self._log.append(step, self._clock(), values)
        self._metrics.record(values)
        value = found.get(self._headline)
        self._update(metric_held_out=value)
        log.info("held out at step %d: %s %s", step, self._headline, value)
        return value
