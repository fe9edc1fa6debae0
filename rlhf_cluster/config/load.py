"""Loading run files of any kind, and pipeline files with several of them.

A run file is a run of reinforcement learning, an offline stage, or a stage that makes a data set. A
pipeline file has several:

    [pipeline]               name and root
    [stages.sft]             each table a complete run file, without run.name and run.root
    [stages.dpo]             "{stages.sft.final}" in any text is the model that sft exports,
                             "{stages.NAME-0.final}" that of the first member of an ensemble, and
                             "{stages.NAME.data}" the file of a stage that makes a data set

A stage with several members (`offline.train_ensemble`) becomes one run file per member:

    NAME, members = 3   ->   NAME/NAME-0, NAME/NAME-1, NAME/NAME-2

Promises:
- tables run in their order, each in a run directory named after it, below the pipeline's;
- a table may name the results of earlier tables, and nothing else of them;
- all tables are checked before the first one runs;
- a member differs from its stage in name, folder, seed and `stage.member` only. Seeds differ
  between members, and between the members of two stages with different seeds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field
from xxhash import xxh3_64_intdigest

from rlhf_cluster.config.dataset_config import GenerateConfig
from rlhf_cluster.config.run_config import RunConfig
from rlhf_cluster.config.stage_config import StageConfig
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.offline.train_ensemble import EnsembleSection
from rlhf_cluster.sections.every_run import NAME_PATTERN
from rlhf_cluster.sections.section import (
    Section,
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


def members_of(config: AnyConfig) -> list[AnyConfig]:
    """Return the runs of a run file: the file itself, or one run per member of its stage."""
    section = config.stage if isinstance(config, StageConfig) else None
    if not isinstance(section, EnsembleSection) or section.members == 1:
        return [config]
    chosen = range(section.members) if section.member is None else [section.member]
    return [_member(config, number) for number in chosen]


def name_in_file(config: AnyConfig) -> str:
    """Return the name in the file of `config`, or of the ensemble that `config` is a member of."""
    section = config.stage if isinstance(config, StageConfig) else None
    if not isinstance(section, EnsembleSection) or section.members == 1:
        return config.run.name
    return config.run.name.removesuffix(f"-{section.member}")


def _member(config: AnyConfig, number: int) -> StageConfig:
    name, seed = config.run.name, config.run.seed
    tree = config.model_dump()
    tree["run"] |= {
        "name": f"{name}-{number}",
        "root": str(Path(config.run.root) / name),
        "seed": xxh3_64_intdigest(f"{seed}/member/{number}".encode()) % 2**31,
    }
    tree["stage"]["member"] = number
    return StageConfig.model_validate(tree)


_PLACE = re.compile(r"\{stages\.([^.{}]*)\.([^.{}]*)\}")


class PipelineSection(Section):
    """Name and parent folder of the pipeline's files."""

    name: str = Field(pattern=NAME_PATTERN)
    """Folder below `root` that holds the run directories of the stages."""
    root: str = "runs"
    """Folder that holds the runs. On a cluster every node must see it."""


class PipelineFile(Section):
    """A file of several stages."""

    pipeline: PipelineSection
    stages: dict[str, dict[str, Any]] = Field(min_length=1)
    """Complete run files by name, without run.name and run.root, in the order in which they run."""


def load_all(path: str | Path, overrides: Sequence[str] = ()) -> list[AnyConfig]:
    """Return the runs of a file in order: one, or the stages of a pipeline. Raises `ConfigError`."""
    tree = read_tree(path, overrides)
    if not _is_pipeline(tree):
        return members_of(of_tree(tree, str(path)))
    file = validate(PipelineFile, tree, str(path))
    folder = Path(file.pipeline.root).absolute() / file.pipeline.name
    found: list[AnyConfig] = []
    left: dict[str, str] = {}
    for name, table in file.stages.items():
        source = f"{path}, [stages.{name}]"
        own = dict(_fill_places(table, left, source, "") if isinstance(table, Mapping) else {})
        for config in members_of(of_tree(_add_run(own, name, folder, source), source)):
            if any(config.run.name == each.run.name for each in found):
                raise ConfigError(
                    f"{source}: {config.run.name} is a member of an ensemble before it. Give the table "
                    "another name"
                )
            found.append(config)
            left |= {f"{config.run.name}.{what}": str(path) for what, path in _left(config)}
    return found


def pipeline_of(path: str | Path, overrides: Sequence[str] = ()) -> PipelineSection | None:
    """Return [pipeline] as it is written, or None for a file of one run. Raises `ConfigError`."""
    tree = read_tree(path, overrides)
    return validate(PipelineFile, tree, str(path)).pipeline if _is_pipeline(tree) else None


def needs(config: AnyConfig, earlier: Sequence[AnyConfig]) -> list[str]:
    """Return the runs of `earlier` whose output `config` reads and that have not produced it yet."""
    texts = _texts(config.model_dump(mode="json"))
    left = {c.run.name: path.absolute() for c in earlier for _, path in _left(c)}
    return [name for name, path in left.items() if str(path) in texts and not path.exists()]


def _left(config: AnyConfig) -> list[tuple[str, Path]]:
    """Return the outputs of `config` that later stages may read, with their names in a file."""
    if isinstance(config, GenerateConfig):
        return [("data", config.data_file)]
    return [("final", config.run_dir / "final")]


def _is_pipeline(tree: Mapping[str, Any]) -> bool:
    return "pipeline" in tree or "stages" in tree


def _add_run(tree: dict[str, Any], name: str, folder: Path, source: str) -> dict[str, Any]:
    """Add `run.name` and `run.root` to the table of a stage. Raises `ConfigError` if it has one."""
    run = tree.get("run") or {}
    if not isinstance(run, Mapping):
        raise ConfigError(f"{source}: run = {run!r}: not a section. Give [run] with its keys")
    run = dict(run)
    for key in ("name", "root"):
        if key in run:
            raise ConfigError(
                f"{source}: run.{key} = {run[key]!r}: a stage's folder is [pipeline]'s, and its name "
                "that of its table. Remove it"
            )
    return {**tree, "run": {**run, "name": name, "root": str(folder)}}


def _fill_places(value: Any, left: Mapping[str, str], source: str, key: str) -> Any:
    """Replace "{stages.NAME.WHAT}" in all texts of `value` by the path of that earlier output.

    Raises `ConfigError` for an output that no earlier stage has.
    """
    if isinstance(value, Mapping):
        return {
            k: _fill_places(v, left, source, f"{key}.{k}".lstrip(".")) for k, v in value.items()
        }
    if isinstance(value, list):
        return [_fill_places(v, left, source, key) for v in value]
    if not isinstance(value, str):
        return value

    def path(match: re.Match[str]) -> str:
        if (name := ".".join(match.groups())) not in left:
            known = ", ".join(f"{{stages.{name}}}" for name in left) or "none"
            raise ConfigError(
                f"{source}: {key} = {value!r}: {match[0]} is nothing that an earlier stage leaves; "
                f"known here: {known}"
            )
        return left[name]

    return _PLACE.sub(path, value)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
