"""Loading a run file of either kind: a run of reinforcement learning, or an offline stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cluster.config.base import read_tree, validate
from rlhf_cluster.config.run import RunConfig
from rlhf_cluster.config.stage import StageConfig

AnyConfig = RunConfig | StageConfig


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read and validate a run file: a stage where it has [stage], else a run. Raises `ConfigError`."""
    return of_tree(read_tree(path, overrides), str(path))


def of_tree(tree: dict[str, Any], source: str) -> AnyConfig:
    """The same of what a file holds."""
    return validate(StageConfig if "stage" in tree else RunConfig, tree, source)
