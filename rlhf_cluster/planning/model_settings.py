"""Settings of a run by the size of its model: the transport of versions and the start deadline.

The deadline is that of services and ranks, which read the model before they answer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.config.check_training import folder_beside_copies
from rlhf_cluster.errors import WeightError
from rlhf_cluster.models.model_folder import checkpoint_shapes
from rlhf_cluster.planning.memory_needs import BYTES
from rlhf_cluster.sections.rl_run import Generation

C = TypeVar("C", bound=RunConfig | StageConfig | GenerateConfig)


def with_transport(config: RunConfig, model_dir: str | Path) -> RunConfig:
    """Return `config` with "files" or "relay" in place of "auto", for all processes of the run.

    The relay is chosen where `weights.mirror` is set, and where a version is larger than
    `weights.relay_above_bytes` and more than one process reads it. It is not chosen automatically for
    a store in the memory of one machine, which gains nothing: the copies would be in the same memory.
    """
    weights = config.weights
    if weights.transport != "auto":
        return config
    chosen = "relay" if weights.is_relayed or _gains(config, model_dir) else "files"
    return config.model_copy(update={"weights": weights.model_copy(update={"transport": chosen})})


def _gains(config: RunConfig, model_dir: str | Path) -> bool:
    generation = config.generation
    scale = config.autoscale.generation if config.autoscale is not None else None
    workers = max(generation.workers, scale.maximum if scale is not None else 0)
    if workers * generation.tensor_parallel_size < 2 or folder_beside_copies(config) is not None:
        return False
    return _version_bytes(config, model_dir) > config.weights.relay_above_bytes


def _version_bytes(config: RunConfig, model_dir: str | Path) -> int:
    """Return the bytes of a full version, or 0 for a folder whose tensors cannot be listed.

    A worker refuses such a folder with the reason.
    """
    try:
        shapes = checkpoint_shapes(model_dir)
    except WeightError:
        return 0
    return BYTES[config.publish_dtype] * sum(math.prod(shape) for shape in shapes.values())


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
