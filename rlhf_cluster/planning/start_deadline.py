"""Deadline of the start of services and ranks, which read the model before they answer."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.sections.rl_run import Generation

C = TypeVar("C", bound=RunConfig | StageConfig | GenerateConfig)


def with_start_deadline(config: C, model_dir: str | Path) -> C:
    """Return `config` with a start deadline that includes the time of reading the model.

    That time is the size of the files at `generation.pull_bytes_per_s`, in whole seconds. Ranks of an
    offline stage read at its default.
    """
    default = Generation.model_fields["pull_bytes_per_s"].default
    section = None if isinstance(config, StageConfig) else config.generation
    rate = default if section is None else section.pull_bytes_per_s
    more_s = _model_bytes(Path(model_dir)) // rate
    if not more_s:
        return config
    timeout_s = config.run.start_timeout_s + more_s
    run = config.run.model_copy(update={"start_timeout_s": timeout_s})
    return config.model_copy(update={"run": run})


def _model_bytes(folder: Path) -> int:
    """Return the bytes of a model's files, or 0 where they cannot be listed.

    The process that reads such a folder refuses it with the reason.
    """
    try:
        return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    except OSError:
        return 0
