"""The configuration of a run: sections, cross-checks, loading. Importing it loads no torch or ray.

`RunConfig`, `StageConfig` and what loads them are imported when first used: algorithms, rewards and
stages keep their sections beside their code and build on `config.base`, and `config.run` and
`config.stage` in turn hold those sections.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rlhf_cluster.config.base import Section, load, validate

if TYPE_CHECKING:
    from rlhf_cluster.config.either import load_any
    from rlhf_cluster.config.generate import GenerateConfig
    from rlhf_cluster.config.run import RunConfig, load_run
    from rlhf_cluster.config.stage import StageConfig

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
    "GenerateConfig": "generate",
    "RunConfig": "run",
    "load_run": "run",
    "StageConfig": "stage",
    "load_any": "either",
}


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        module = importlib.import_module(f"rlhf_cluster.config.{_WHERE[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
