"""Sections that every run file has: [run], [cluster] and [observe].

The run directory is defined only here. `with_absolute_paths` changes no other setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Literal, Self, TypeVar

from pydantic import Field, PositiveFloat, PositiveInt, field_validator

from rlhf_cluster.sections.section import Section

SinkName = Literal["tensorboard", "wandb", "mlflow"]


class ClusterSection(Section):
    """The Ray cluster: the one at `address`, or one started on this machine."""

    address: str | None = None
    """Address to join; default: RAY_ADDRESS, else a local cluster of this run alone."""
    num_cpus: PositiveFloat | None = None
    """Logical CPUs of a local cluster; default: this machine's cores."""
    object_store_bytes: PositiveInt | None = None
    """Shared memory of a local cluster for objects; default: Ray's share of the machine."""
    dashboard: bool = False
    dashboard_port: int = Field(default=8265, ge=1, le=65535)
    placement_timeout_s: PositiveFloat = 60.0
    node_timeout_s: float = Field(default=0.0, ge=0)
    """Over 0: what has no room on the nodes that are there waits this long for nodes that the cluster's
    autoscaler starts. 0: it is refused at once."""
    worker_groups: bool = False
    """Every worker asks for nodes of its own group, by a resource that they offer: rlhf_generation,
    rlhf_scoring, rlhf_training. deploy/kuberay and deploy/slurm set up such nodes."""
    heartbeat_s: PositiveFloat = 5.0
    """How often every worker is asked whether it can serve."""
    heartbeat_timeout_s: PositiveFloat = 60.0
    """A worker that does not answer for this long is replaced."""
    max_restarts: int = Field(default=10, ge=0)
    """Replacements of a pool within `restart_window_s`, or one for each of its workers if that is more.
    With none left the pool goes on with the workers that live, until the window allows another; with
    fewer than its `min_workers` the run fails with the first cause. 0: none is ever replaced."""
    restart_window_s: PositiveFloat = 3600.0
    """The time within which restarts are counted, those of `learner.max_restarts` too."""

    @property
    def room_timeout_s(self) -> float:
        """How long a placement may wait for room, new nodes included."""
        return max(self.placement_timeout_s, self.node_timeout_s)


class Observe(Section):
    """What a run leaves behind."""

    samples_per_step: int = Field(default=16, ge=0)
    """Rollouts of each step written to samples/*.parquet; 0 for none."""
    live: bool = True
    """A live view on a terminal; plain lines otherwise."""
    sinks: tuple[SinkName, ...] = ()
    """Where metrics go besides metrics.jsonl: "tensorboard", "wandb", "mlflow", each an extra of that
    name (pip install 'rlhf-cluster[wandb]'). W&B stays offline unless WANDB_MODE says otherwise, MLflow
    in the run directory unless MLFLOW_TRACKING_URI does."""

    write_timeout_s: PositiveFloat = 60.0
    """Deadline of a line of metrics.jsonl. Until then lines wait in memory, in order, and the run goes
    on; past it the run ends."""
    slow_write_fraction: float = Field(default=0.25, gt=0, lt=1)
    """A write to disk (a group, a line, a checkpoint, a version) is told of as slow after this share of
    its own deadline."""

    @field_validator("samples_per_step")
    @classmethod
    def _bounded(cls, value: int) -> int:
        if value > 100_000:
            raise ValueError(f"samples_per_step = {value} is over 100000; it is a sample, lower it")
        return value


NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class RunSection(Section):
    """Where a run leaves its files, and from which seed it follows."""

    name: str = Field(pattern=NAME_PATTERN)
    """Folder name of the run below `root`."""
    root: str = "runs"
    """Folder that holds the runs; on a cluster one that every node sees."""
    seed: int = Field(default=0, ge=0)
    start_timeout_s: PositiveFloat = 600.0
    """The run fails when its services or ranks are not up after this long."""


R = TypeVar("R", bound=RunSection)


class RunFile(Section, Generic[R]):
    """A run file of any kind."""

    run: R
    cluster: ClusterSection = ClusterSection()
    observe: Observe = Observe()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.root) / self.run.name

    @property
    def weights_dir(self) -> Path:
        return self.run_dir / "weights"

    def with_absolute_paths(self) -> Self:
        """The same with folders that mean the same in every process."""
        root = str(Path(self.run.root).absolute())
        return self.model_copy(update={"run": self.run.model_copy(update={"root": root})})
