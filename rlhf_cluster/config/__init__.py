"""The configuration of a run: sections, cross-checks, loading. Importing it loads no torch or ray.

`RunConfig`, `StageConfig` and their loaders are imported when first used, which avoids an import
cycle: algorithms, rewards and stages keep their sections with their code and build on
`sections.section`, and `config.run_config` and `config.stage_config` hold those sections.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf_cluster.sections.section import (
    Section,
    load,
    validate,
)

if TYPE_CHECKING:
    from rlhf_cluster.config.dataset_config import GenerateConfig
    from rlhf_cluster.config.load import load_any
    from rlhf_cluster.config.run_config import (
        RunConfig,
        load_run,
    )
    from rlhf_cluster.config.stage_config import StageConfig

__all__ = [
    "GenerateConfig",
    "RunConfig",
    "Section",
    "StageConfig",
    "load",
    "load_any",
    "load_run",
    "validate",
]

_WHERE = {
    "GenerateConfig": "dataset_config",
    "RunConfig": "run_config",
    "load_run": "run_config",
    "StageConfig": "stage_config",
    "load_any": "load",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        module = importlib.import_module(f"rlhf_cluster.config.{_WHERE[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
