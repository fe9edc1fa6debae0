"""The configuration of a run: sections, cross-checks, loading. Importing it loads no torch or ray.

`RunConfig` and `load_run` are loaded when first used: algorithms and rewards keep their sections
beside their code and build on `config.base`, and `config.run` in turn holds those sections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_cluster.config.base import Section, load, validate

if TYPE_CHECKING:
    from rlhf_cluster.config.run import RunConfig, load_run

__all__ = ["RunConfig", "Section", "load", "load_run", "validate"]


def __getattr__(name: str) -> Any:
    if name in ("RunConfig", "load_run"):
        from rlhf_cluster.config import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
