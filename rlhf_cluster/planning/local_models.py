"""A Hub id in `model.path`: resolved once to a folder, before a run is checked and stored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.models.hub import is_hub_id, local_folder

C = TypeVar("C", bound=RunConfig | StageConfig | GenerateConfig)


def with_local_model(config: C, find_folder: Callable[[str], Path] = local_folder) -> C:
    """Return `config` with the folder of the model in place of its Hub id. Raises `ConfigError`.

    `find_folder` returns the folder of a Hub id. Other paths stay as they are.
    """
    path = config.model.path
    if path is None or not is_hub_id(path):
        return config
    model = config.model.model_copy(update={"path": str(find_folder(path))})
    return config.model_copy(update={"model": model})


def find_without_network(hub_id: str) -> Path:
    """Return the folder of a model in the cache. Raises `ConfigError` for one that is not there."""
    return local_folder(hub_id, fetch=None)
