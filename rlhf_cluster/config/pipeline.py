"""A pipeline: several runs and stages in one file, one after the other.

    [pipeline]               name and root
    [stages.sft]             each table a whole run file, without run.name and run.root
    [stages.dpo]             "{stages.sft.final}" in any text is the model that sft leaves, and
                             "{stages.NAME-0.final}" that of the first member of an ensemble

Promises: the tables are run in their order; each is a run directory of its own, named as its table,
below the pipeline's; a table may name what earlier ones leave, and nothing else of them. All tables
are checked before the first is run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from rlhf_cluster.config.base import Section, read_tree, validate
from rlhf_cluster.config.either import AnyConfig, of_tree
from rlhf_cluster.config.members import members_of
from rlhf_cluster.errors import ConfigError

_PLACE = re.compile(r"\{stages\.([^.{}]*)\.([^.{}]*)\}")


class PipelineSection(Section):
    """Where the stages leave their files."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Folder below `root` that holds the stages' own."""
    root: str = "runs"
    """Folder that holds the runs; on a cluster one that every node sees."""


class PipelineFile(Section):
    """A file of several stages."""

    pipeline: PipelineSection
    stages: dict[str, dict[str, Any]] = Field(min_length=1)


def load_all(path: str | Path, overrides: Sequence[str] = ()) -> list[AnyConfig]:
    """All that a file runs, in order: one, or the stages of a pipeline. Raises `ConfigError`."""
    tree = read_tree(path, overrides)
    if not _is_pipeline(tree):
        return members_of(of_tree(tree, str(path)))
    file = validate(PipelineFile, tree, str(path))
    folder = Path(file.pipeline.root).absolute() / file.pipeline.name
    found: list[AnyConfig] = []
    finals: dict[str, str] = {}
    for name, table in file.stages.items():
        source = f"{path}, [stages.{name}]"
        own = dict(_filled(table, finals, source, "") if isinstance(table, Mapping) else {})
        for config in members_of(of_tree(_placed(own, name, folder, source), source)):
            if config.run.name in finals:
                raise ConfigError(
                    f"{source}: {config.run.name} is a member of an ensemble before it. Give the table "
                    "another name"
                )
            found.append(config)
            finals[config.run.name] = str(config.run_dir / "final")
    return found


def pipeline_of(path: str | Path, overrides: Sequence[str] = ()) -> PipelineSection | None:
    """The [pipeline] of a file as it is written; None for a file of one run. Raises `ConfigError`."""
    tree = read_tree(path, overrides)
    return validate(PipelineFile, tree, str(path)).pipeline if _is_pipeline(tree) else None


def needs(config: AnyConfig, earlier: Sequence[AnyConfig]) -> list[str]:
    """The names of those of `earlier` that `config` takes a model from that is not there yet."""
    texts = _texts(config.model_dump(mode="json"))
    finals = {c.run.name: (c.run_dir / "final").absolute() for c in earlier}
    return [n for n, final in finals.items() if str(final) in texts and not final.exists()]


def _is_pipeline(tree: Mapping[str, Any]) -> bool:
    return "pipeline" in tree or "stages" in tree


def _placed(tree: dict[str, Any], name: str, folder: Path, source: str) -> dict[str, Any]:
    run = dict(tree.get("run") or {})
    for key in ("name", "root"):
        if key in run:
            raise ConfigError(
                f"{source}: run.{key} = {run[key]!r}: a stage's folder is [pipeline]'s, and its name "
                "that of its table. Remove it"
            )
    return {**tree, "run": {**run, "name": name, "root": str(folder)}}


def _filled(value: Any, finals: Mapping[str, str], source: str, key: str) -> Any:
    """`value` with what the stages before leave in place of their names."""
    if isinstance(value, Mapping):
        return {k: _filled(v, finals, source, f"{key}.{k}".lstrip(".")) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(v, finals, source, key) for v in value]
    if not isinstance(value, str):
        return value

    def final(match: re.Match[str]) -> str:
        stage, what = match.groups()
        if what != "final" or stage not in finals:
            known = ", ".join(f"{{stages.{name}.final}}" for name in finals) or "none"
            raise ConfigError(
                f"{source}: {key} = {value!r}: {match[0]} is nothing that an earlier stage leaves; "
                f"known here: {known}"
            )
        return finals[stage]

    return _PLACE.sub(final, value)


def _texts(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list):
        return [text for item in value for text in _texts(item)]
    return [value] if isinstance(value, str) else []
