"""The driver's eyes on an offline stage: metrics.jsonl, status.json and the screen.

Everything is written when it happens; nothing here waits for anything.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.metrics import RayMetrics
from rlhf_cluster.checkpoint import continuing
from rlhf_cluster.checkpoint.folder import Checkpoint
from rlhf_cluster.config import GenerateConfig, StageConfig
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import RlhfError
from rlhf_cluster.observe import post_mortem
from rlhf_cluster.observe.run_log import RunLog
from rlhf_cluster.observe.sinks import open_sinks
from rlhf_cluster.observe.snapshot import Event, Snapshot, State
from rlhf_cluster.observe.stage_curve import held_out_name
from rlhf_cluster.ports import StepReport
from rlhf_cluster.rundir import RunDir

log = logging.getLogger(__name__)

MAX_EVENTS = 6


class StageObserver:
    """`show` gets every new snapshot; `headline` is the metric that the stage is watched by."""

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
        self._config, self._rundir, self._show, self._clock = config, rundir, show, clock
        self._headline, self._constants, self._started_s = headline, constants, started_s
        self._log = RunLog(rundir, open_sinks(config, rundir.path, self.event))
        self._metrics = RayMetrics("controller", {"run": config.run.name})
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self.first_step_s: float | None = None
        self.snapshot = Snapshot(
            run=config.run.name,
            state="starting",
            step=0,
            num_steps=num_steps,
            time_s=started_s,
            stage=config.stage.type,
            metric=headline,
        )

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
        """`step` is done: metrics by name, tokens by wall time, and wall time of one step."""
        now = self._clock()
        if self.first_step_s is None:
            self.first_step_s = now - self._started_s
        self._log.append(step, now, values)
        self._metrics.record(values)
        value = values.get(self._headline)
        log.info("step %d: %s %.4g, %.3g s", step, self._headline, value or 0.0, step_s)
        self._update(
            state="running",
            step=step,
            metric_value=value,
            tokens_per_s=tokens_per_s,
            step_s=step_s,
        )

    def evaluation(self, step: int, found: Mapping[str, float]) -> float | None:
        """Log one evaluation; returns its headline."""
        values = {held_out_name(name): value for name, value in found.items()}
        self._log.append(step, self._clock(), values)
        self._metrics.record(values)
        value = found.get(self._headline)
        self._update(metric_held_out=value)
        log.info("held out at step %d: %s %s", step, self._headline, value)
        return value

    def event(self, text: str) -> None:
        self._tell(text)

    def state(self, state: State, error: str | None = None) -> None:
        log.info("%s%s", state, f": {error}" if error else "")
        self._update(state=state, error=error)

    def resumed(self, step: int) -> None:
        self._update(step=step, checkpoint=step)
        self.event(f"continues from the checkpoint of step {step}")

    def checkpointed(self, step: int) -> None:
        log.info("checkpoint of step %d is complete", step)
        self._update(checkpoint=step)

    def recovering(self, lost: RlhfError, restart: int, limit: int, step: int | None) -> None:
        where = "from the beginning" if step is None else f"from its checkpoint of step {step}"
        text = f"{lost}: the stage goes on {where}, restart {restart} of {limit}"
        self._tell(text, state="recovering", restarts=restart)

    def cut_back(self, checkpoint: Checkpoint | None) -> None:
        """Take back what was told of the steps after `checkpoint`, or of all."""
        continuing.cut_back(self._rundir, checkpoint)
        self._log.reopen()
        step = None if checkpoint is None else checkpoint.state.step
        self._update(step=step or 0, checkpoint=step)

    def post_mortem(self, error: BaseException) -> None:
        """Leave what is known of the stage that `error` ends. Raises nothing."""

        def document() -> dict[str, Any]:
            return post_mortem.describe(
                time_s=self._clock(),
                run=self.snapshot.run,
                error=error,
                status=json.loads(self.snapshot.to_json()),
                services={},
                logs=post_mortem.read_tails(self._rundir.logs),
                stacks=post_mortem.own_stacks(),
                config=self._config.model_dump(mode="json"),
                packages=packages_of(self._rundir.environment),
                variables=os.environ,
            )

        post_mortem.write(self._rundir.path / post_mortem.NAME, document)

    def close(self) -> None:
        self._log.close()

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
        self._rundir.write_status(self.snapshot)
        self._show(self.snapshot)


def packages_of(environment: Path) -> dict[str, str | None]:
    return json.loads(environment.read_text())["packages"]
