"""Writers of what a run records of itself: metrics.jsonl and status.json.

Promises for metrics.jsonl:
- a line is one JSON object with `step`, `time_s` and metrics by name, each a finite number or null;
- `append` waits for no disk: lines are written in order in the background, each for at most the
  deadline of `patience`, and the next call raises the error of a line that failed;
- steps never decrease, but for lines of an earlier step that are said to be `late`;
- the torn last line of a crash is ignored by readers, and removed before the next line.
Several lines of one step (an evaluation and a training step) are read as one record.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Callable, Mapping

from rlhf_cluster.errors import RunError, StalledError
from rlhf_cluster.observe.metric_table import find
from rlhf_cluster.observe.sinks import Sinks
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, _cut_torn_line, read_metrics
from rlhf_cluster.util.slow_disk import BackgroundWriter, DiskDeadline

log = logging.getLogger(__name__)


PATIENCE = DiskDeadline(limit_s=60.0, setting="observe.write_timeout_s")


class RunLog:
    """Writer of metrics.jsonl of one run, for one process at a time.

    `sinks` get the same records. `write` is replaced by tests.
    """

    def __init__(
        self,
        run: RunDir,
        sinks: Sinks | None = None,
        patience: DiskDeadline = PATIENCE,
        write: Callable[[int, memoryview], int] = os.write,
    ) -> None:
        self._run, self._sinks, self._write_file = run, sinks, write
        self._lines = BackgroundWriter(f"a line of {run.metrics}", patience, grace_s=0.0)
        self._open()

    def _open(self) -> None:
        run = self._run
        _cut_torn_line(run.metrics)
        records = read_metrics(run.metrics)
        self._last_step = records[-1]["step"] if records else 0
        self._file = run.metrics.open("ab", buffering=0)

    @property
    def last_step(self) -> int:
        """Newest step that has a line; 0 without any."""
        return self._last_step

    def append(
        self, step: int, time_s: float, values: Mapping[str, float], late: bool = False
    ) -> None:
        """Add one line. `time_s` is unix time. A line that is `late` may be of an earlier step.

        Raises `MetricError` for a name that is not in the table, and `RunError` when an earlier line
        could not be written completely, since the run then has no record.
        """
        if step < self._last_step and not late:
            raise RunError(
                f"{self._run.metrics}: step {step} after step {self._last_step}; steps never go "
                "back. Is another run writing here?"
            )
        for name in values:
            find(name)
        line = {"step": step, "time_s": time_s}
        line |= {k: float(v) if math.isfinite(v) else None for k, v in values.items()}
        self._write(json.dumps(line, allow_nan=False).encode() + b"\n")
        self._last_step = max(step, self._last_step)
        if self._sinks is not None:
            self._sinks.log(step, values)

    @property
    def num_dropped_sinks(self) -> int:
        return 0 if self._sinks is None else self._sinks.num_dropped

    def flush(self) -> None:
        """Write every line to the file.

        Waits for: the disk, at most the deadline. Raises `RunError`.
        """
        try:
            self._lines.flush()
        except StalledError as error:  # an OSError too, as every TimeoutError
            raise self._too_slow(error) from error

    def _write(self, line: bytes) -> None:
        """Write a line in the background. Raises `RunError`, also for an earlier line."""
        try:
            self._lines.put(functools.partial(self._write_now, self._file.fileno(), line))
        except StalledError as error:
            raise self._too_slow(error) from error

    def _too_slow(self, error: StalledError) -> RunError:
        return RunError(
            f"{error}. Look at that disk, or give run.root a faster one, and give the same command "
            "again: it resumes from the last checkpoint"
        )

    def _write_now(self, fd: int, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._write_file(fd, rest) :]
        except OSError as error:
            raise RunError(
                f"{self._run.metrics}: a line of {len(line)} bytes cannot be written ({error}). Free "
                "space there, and give the same command again: it resumes from the last checkpoint"
            ) from error

    def cut(self, cut: Callable[[], None]) -> None:
        """Continue the file after what `cut` leaves of it.

        Lines that wait are written before the cut: later they would be behind it. Raises as `flush`.
        """
        self.flush()
        cut()
        self._file.close()
        self._open()

    def close(self) -> None:
        """Write the lines that wait, then close the file and the sinks.

        Waits for: the lines, at most the deadline; the sinks, at most `sinks.CLOSE_TIMEOUT_S`. Lines
        that are not written by then are logged and hide no error: `flush` raises.
        """
        try:
            self.flush()
        except RunError as error:
            log.error("the record is not whole: %s", error)
        else:
            self._file.close()
        if self._sinks is not None:
            self._sinks.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StatusFile:
    """Writer of status.json, which a slow disk never delays. For one process. Raises nothing.

    The newest snapshot is written in the background; older ones that a slow disk did not reach are
    skipped. A late status is logged once: it is a view, and no reason to end a run.
    """

    def __init__(self, run: RunDir, patience: DiskDeadline) -> None:
        self._run = run
        self._behind = BackgroundWriter(str(run.status), patience, grace_s=0.0)
        self._late = False

    def show(self, snapshot: Snapshot) -> None:
        """Write `snapshot` in place of the one before. Returns at once."""
        try:
            self._behind.put(lambda: self._run.write_status(snapshot), latest=True)
        except StalledError as error:
            self._tell(error)
        else:
            self._late = False

    def close(self) -> None:
        """Write the newest snapshot.

        Waits for: the disk, at most the deadline.
        """
        try:
            self._behind.flush()
        except StalledError as error:
            self._tell(error)

    def _tell(self, error: StalledError) -> None:
        if not self._late:
            log.warning("%s; it shows an earlier time", error)
        self._late = True
