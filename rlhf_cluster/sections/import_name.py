"""Import of code of other packages by its path, "package.module:Name"."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from typing import Any

from rlhf_cluster.errors import ConfigError


def import_name(path: str, what: str) -> Any:
    """Import "module:name", also from the working directory.

    Raises `ConfigError` that begins with `what`, and names this node and the error of the import.
    """
    module_name, _, name = path.partition(":")
    here = os.getcwd()
    if here not in sys.path:  # a console script does not look in the working directory
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    # Code of another package may raise anything.
    except Exception as error:
        raise ConfigError(
            f"{what} cannot be imported from {path!r} on node {platform.node()}: "
            f"{type(error).__name__}: {error}. Correct the path, or bring the package to every node: "
            "install it in the Python there, or put it in the folder that the run is started from"
        ) from error
    return found


def is_built_in(found: type) -> bool:
    """Return whether a class is of this project, so that every node has it."""
    return found.__module__.partition(".")[0] in ("rlhf_cluster", "actors")


def restore_section(path: str, state: Any) -> Any:
    """Rebuild a pickled section of another package. Raises `ConfigError` where it is not installed."""
    cls = import_name(path, "a section of the run")
    section = cls.__new__(cls)
    section.__setstate__(state)
    return section
