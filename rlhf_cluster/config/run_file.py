"""What every run file has: a place for what the run leaves, its cluster, and what is observed of it.

Promises: nobody else says where a run directory is; `with_absolute_paths` changes no other setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import Field, PositiveFloat

from rlhf_cluster.config.base import Section
from rlhf_cluster.config.operating import ClusterSection, Observe

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
