"""The configuration of a run: sections, cross-checks, loading. Importing it loads no torch or ray."""

from rlhf_cluster.config.base import Section, load, validate
from rlhf_cluster.config.run import RunConfig, load_run

__all__ = ["RunConfig", "Section", "load", "load_run", "validate"]
