"""Destinations of metrics besides metrics.jsonl: TensorBoard, W&B, MLflow, through one interface.

Promises:
- a missing package is an error before anything starts (`check_sinks`);
- a sink that fails to open, raises, or falls behind is counted, logged once and dropped. It never ends
  or delays the run: each has its own thread and queue;
- values that are not finite are not sent.

To add a sink: a class with `log` and `close`, and a row in `SINKS`, or in another package as
`docs/extending.md` describes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.sections.every_run import SINK_NAMES
from rlhf_cluster.util.provenance import remove_secrets

if TYPE_CHECKING:
    from rlhf_cluster.config.load import AnyConfig

CLOSE_TIMEOUT_S = 15.0
MAX_BEHIND = 1000  # records that wait for one sink


class Sink(Protocol):
    """Destination of the metrics of a run. Its methods are called from one thread."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log finite values by the names of the table of metrics. A step may come twice."""
        ...

    def close(self) -> None:
        """Write everything that was logged."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """Run that is logged. `folder` belongs to the sink, and may not exist yet."""

    name: str
    folder: Path
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkKind:
    """Kind of sink. `package` is imported by `build` alone; None where `build` is imported already."""

    package: str | None
    build: Callable[[RunInfo], Sink]


class _TensorBoard:
    def __init__(self, about: RunInfo) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(about.folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[reportAttributeAccessIssue]

        event = Event(wall_time=time.time(), step=step)
        for name, value in values.items():
            event.summary.value.add(tag=name, simple_value=value)
        self._writer.add_event(event)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Run of W&B; a resumed run is the same one."""

    def __init__(self, about: RunInfo) -> None:
        import wandb  # type: ignore[reportMissingImports]

        about.folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            name=about.name,
            id=hashlib.sha256(str(about.folder).encode()).hexdigest()[:16],
            resume="allow",
            dir=str(about.folder),
            mode=os.environ.get("WANDB_MODE", "offline"),
            config=dict(about.settings),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Mlflow:
    _BATCH = 1000  # metrics of one request

    def __init__(self, about: RunInfo) -> None:
        from mlflow.tracking import MlflowClient  # type: ignore[reportMissingImports]

        uri = os.environ.get("MLFLOW_TRACKING_URI") or about.folder.absolute().as_uri()
        self._client = MlflowClient(tracking_uri=uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rlhf-cluster")
        found = self._client.get_experiment_by_name(name)
        experiment = found.experiment_id if found else self._client.create_experiment(name)
        self._id = self._client.create_run(experiment, run_name=about.name).info.run_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        from mlflow.entities import Metric  # type: ignore[reportMissingImports]

        now_ms = int(time.time() * 1000)
        rows = [Metric(name, value, now_ms, step) for name, value in values.items()]
        for first in range(0, len(rows), self._BATCH):
            self._client.log_batch(self._id, metrics=rows[first : first + self._BATCH])

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _SinkKinds(dict[str, SinkKind]):
    """Built-in kinds of sinks by name. `kinds[name]` also finds those of other packages."""

    def __missing__(self, name: str) -> SinkKind:
        return SinkKind(package=None, build=SINK_NAMES[name])


SINKS = _SinkKinds(
    tensorboard=SinkKind(package="tensorboard", build=_TensorBoard),
    wandb=SinkKind(package="wandb", build=_Wandb),
    mlflow=SinkKind(package="mlflow", build=_Mlflow),
)


def check_sinks(names: Sequence[str], kinds: Mapping[str, SinkKind] = SINKS) -> None:
    """Check that each sink is a sink and its package is installed. Raises `ConfigError`."""
    for name in names:
        package, build = kinds[name].package, kinds[name].build
        # What a function returns is not known before it is called; a class is.
        lacks = [m for m in ("log", "close") if isinstance(build, type) and not hasattr(build, m)]
        if lacks or not callable(build):
            raise ConfigError(
                f"observe.sinks: {name!r} is {build!r}, not a sink: it "
                + (f"has no {' and no '.join(lacks)}" if lacks else "cannot be called")
                + ". Name a class with log(step, values) and close(), made from one RunInfo"
            )
        if package is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"observe.sinks: {name!r} needs the package {package}, which is not "
                f"installed. pip install 'rlhf-cluster[{name}]', or leave it out"
            )


@dataclass(slots=True, eq=False)
class _SinkThread:
    """Sink with its thread. `failure` is set by the thread, or when the sink is too far behind."""

    name: str
    build: Callable[[], Sink]
    waiting: queue.Queue[tuple[int, dict[str, float]] | None]  # None ends it
    failure: str | None = None
    reported: bool = False
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name=f"sink-{self.name}", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        """Open the sink and log records until the end.

        Waits for: the next record. Unblocked by: it, or the end that `Sinks.close` sends.
        """
        try:
            sink = self.build()
            while self.failure is None:
                given = self.waiting.get()
                if given is None:
                    sink.close()
                    return
                sink.log(*given)
        # Whatever a foreign package raises costs this sink, not the run.
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"


class Sinks:
    """Sinks of one run. All methods belong to one thread."""

    def __init__(
        self,
        builds: Mapping[str, Callable[[], Sink]],
        tell: Callable[[str], None],
        max_behind: int = MAX_BEHIND,
    ) -> None:
        self._tell = tell
        self._threads = [
            _SinkThread(name=name, build=build, waiting=queue.Queue(max_behind))
            for name, build in builds.items()
        ]

    @property
    def num_dropped(self) -> int:
        return sum(each.failure is not None for each in self._threads)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand the values of a step to every sink. Returns at once. Raises nothing."""
        finite = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        for each in self._threads:
            if each.failure is None:
                try:
                    each.waiting.put_nowait((step, finite))
                except queue.Full:
                    each.failure = f"it is {each.waiting.maxsize} records behind"
        self._tell_of_failures()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Close every sink. Raises nothing.

        Waits for: every sink to write what it has, at most `timeout_s` for all.
        """
        ends = time.monotonic() + timeout_s
        for each in self._threads:
            if each.failure is None:
                try:
                    each.waiting.put(None, timeout=max(0.0, ends - time.monotonic()))
                except queue.Full:
                    each.failure = f"it is {each.waiting.maxsize} records behind"
        for each in self._threads:
            if each.failure is None:
                each.thread.join(max(0.0, ends - time.monotonic()))
                if each.thread.is_alive():
                    each.failure = f"it has not written all within {timeout_s:g} s"
        self._tell_of_failures()

    def _tell_of_failures(self) -> None:
        for each in self._threads:
            if each.failure is not None and not each.reported:
                each.reported = True
                self._tell(
                    f"observe.sinks: {each.name} is dropped: {each.failure}. metrics.jsonl has it all"
                )


def open_sinks(
    config: AnyConfig,
    run_dir: Path,
    tell: Callable[[str], None],
    kinds: Mapping[str, SinkKind] = SINKS,
) -> Sinks:
    """Open the sinks in `observe.sinks`, each with a folder below `sinks` in the run directory."""
    settings = remove_secrets(config.model_dump(mode="json"))

    def build(name: str) -> Sink:
        about = RunInfo(name=config.run.name, folder=run_dir / "sinks" / name, settings=settings)
        return kinds[name].build(about)

    return Sinks({name: lambda name=name: build(name) for name in config.observe.sinks}, tell)
