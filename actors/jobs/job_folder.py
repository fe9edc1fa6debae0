"""Folder and command line of a job on a Ray cluster.

The folder has the configuration, this code, and the data files and Python modules that the
configuration names and the current folder has. Models and run directories are never
sent: they must be folders that every node of the cluster sees.

Promises:
- a path that means something else on another node is refused before anything is sent. The error names
  its key;
- nothing from outside the current folder is sent, other than this code.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
from rlhf_cluster.config.load import (
    AnyConfig,
    load_all,
    name_in_file,
    pipeline_of,
)
from rlhf_cluster.errors import ConfigError

MAX_FILE_BYTES = 50 * 2**20
CODE = Path(__file__).resolve().parents[2]
PACKAGES = ("rlhf_cluster", "actors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Content of a configuration file: its name, all its configurations, and their overrides."""

    name: str
    configs: tuple[AnyConfig, ...]
    overrides: tuple[str, ...]


def read(config_path: Path, overrides: Sequence[str], name: str | None) -> Work:
    """Read and check the work that `config_path` describes, renamed to `name` if one is given.

    The work will join the cluster that runs it, whatever address it names. Raises `ConfigError`.
    """
    pipeline = pipeline_of(config_path, overrides)
    key = "run" if pipeline is None else "pipeline"
    chosen = [*overrides, *([f"{key}.name={name}"] if name else [])]
    pipeline = pipeline_of(config_path, chosen)
    configs = load_all(config_path, chosen)
    _refuse_relative({} if pipeline is None else {"pipeline.root": pipeline.root})
    for config in configs:
        prefix = "" if pipeline is None else f"stages.{name_in_file(config)}."
        _check_paths(config, prefix)
        if config.cluster.address is not None:
            chosen.append(f"{prefix}cluster.address=auto")
    return Work(
        name=name_in_file(configs[0]) if pipeline is None else pipeline.name,
        configs=tuple(configs),
        overrides=tuple(chosen),
    )


def entrypoint(python: str, overrides: Sequence[str]) -> str:
    """Build the job's command line, which runs in the folder that `pack` filled."""
    words = [python, "-m", "rlhf_cluster.cli", "run", "run.toml"]
    for override in overrides:
        words += ["--set", override]
    return shlex.join(words)


def pack(folder: Path, config_path: Path, work: Work, here: Path) -> None:
    """Fill `folder` with what the job needs from this machine; `here` is the current folder.

    Raises `ConfigError` for a file that is too large to send.
    """
    shutil.copy(config_path, folder / "run.toml")
    add_code(folder)
    for config in work.configs:
        for key, text in _data_files(config).items():
            _add_file(folder, key, text, here)
        for module in _named_modules(config):
            for name in (f"{module}.py", module):
                if (here / name).exists() and not (folder / name).exists():
                    _copy(here / name, folder / name)


def add_code(folder: Path) -> None:
    for package in PACKAGES:
        _copy(CODE / package, folder / package)


def _add_file(folder: Path, key: str, text: str | None, here: Path) -> None:
    if text is None or Path(text).is_absolute() or not (here / text).is_file():
        return
    num_bytes = (here / text).stat().st_size
    if num_bytes > MAX_FILE_BYTES or ".." in Path(text).parts:
        raise ConfigError(
            f"{key} = {text!r}: {num_bytes} bytes, {MAX_FILE_BYTES} at most are sent with a "
            "job, from below the current folder. Give an absolute path that every node sees"
        )
    _copy(here / text, folder / text)


def _data_files(config: AnyConfig) -> dict[str, str | None]:
    """Return the paths of the data files by their configuration keys."""
    if isinstance(config, StageConfig):
        return {f"data.sources.{i}.path": s.path for i, s in enumerate(config.data.sources)}
    found = {"data.path": config.data.path}
    if not isinstance(config, GenerateConfig):
        found["evaluation.path"] = config.evaluation.path
        for number, each in enumerate(config.evaluation.sets):
            found[f"evaluation.sets.{number}.data.path"] = each.data and each.data.path
    return found


def _named_modules(config: AnyConfig) -> list[str]:
    """Return the top-level modules of reward functions, and of types that are named by their path."""
    rewards = [] if isinstance(config, StageConfig) else config.scoring.rewards
    paths = [str(getattr(reward, "function", "")) for reward in rewards]
    paths += [*config.observe.sinks, *_types(config.model_dump())]
    return [path.partition(":")[0].partition(".")[0] for path in paths if ":" in path]


def _types(tree: Any) -> Iterator[str]:
    """Yield every `type` of a configuration's tree."""
    if isinstance(tree, dict):
        if isinstance(tree.get("type"), str):
            yield tree["type"]
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for value in tree:
            yield from _types(value)


def _check_paths(config: AnyConfig, prefix: str) -> None:
    """Raise `ConfigError` for a folder of the run that may differ between nodes.

    `prefix`: that of the configuration's keys in the file.
    """
    weights = config.weights.root if isinstance(config, RunConfig) else None
    paths = {"run.root": config.run.root, "weights.root": weights}
    model = {"model.path": config.model.path, "model.tokenizer": config.model.tokenizer}
    paths |= {key: path for key, path in model.items() if path and Path(path).exists()}
    _refuse_relative({prefix + key: path for key, path in paths.items() if path is not None})


def _refuse_relative(paths: dict[str, str]) -> None:
    for key, path in paths.items():
        if not Path(path).is_absolute():
            raise ConfigError(
                f"{key} = {path!r} is relative to this folder, and the job runs in another one. "
                f"Give a folder that every node sees, such as --set {key}=/shared/{path}"
            )


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(source, target)
