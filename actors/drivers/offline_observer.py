"""Records of an offline stage by its driver: metrics.jsonl, status.json and the screen.

Everything is written when it happens; nothing here waits for anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

from actors.drivers.run_observer import Observer
from rlhf_cluster.config import GenerateConfig, StageConfig
from rlhf_cluster.data.units import Unit
from rlhf_cluster.observe.report.learning_curve import held_out_name
from rlhf_cluster.records import StepReport
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.status_snapshot import Snapshot

log = logging.getLogger(__name__)


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
