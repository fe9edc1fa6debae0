"""Loading a run file of any kind.

The kinds are a run of reinforcement learning, an offline stage, and a stage that makes a data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_cluster.config.dataset_config import GenerateConfig
from rlhf_cluster.config.run_config import RunConfig
from rlhf_cluster.config.stage_config import StageConfig
from rlhf_cluster.sections.section import (
    read_tree,
    validate,
)

AnyConfig = RunConfig | StageConfig | GenerateConfig


def load_any(path: str | Path, overrides: Sequence[str] = ()) -> AnyConfig:
    """Read and validate a run file: a stage where it has [stage], by its type, else a run.

    Raises `ConfigError`.
    """
    return of_tree(read_tree(path, overrides), str(path))


def of_tree(tree: dict[str, Any], source: str) -> AnyConfig:
    """Validate the content of a run file; `source` names it in errors. Raises `ConfigError`."""
    stage = tree.get("stage")
    if isinstance(stage, dict) and stage.get("type") == "generate":
        return validate(GenerateConfig, tree, source)
    return validate(RunConfig if stage is None else StageConfig, tree, source)
