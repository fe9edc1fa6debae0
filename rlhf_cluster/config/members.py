"""From a stage of several members to one run file each; what they are is in `stages.ensemble`.

    NAME, members = 3   ->   NAME/NAME-0, NAME/NAME-1, NAME/NAME-2

Promises: everything but name, folder, seed and `stage.member` is the stage's; seeds differ between the
members, and between those of two stages of different seeds.
"""

from __future__ import annotations

from pathlib import Path

from xxhash import xxh3_64_intdigest

from rlhf_cluster.config.either import AnyConfig
from rlhf_cluster.config.stage import StageConfig
from rlhf_cluster.stages.ensemble import EnsembleSection


def members_of(config: AnyConfig) -> list[AnyConfig]:
    """The runs that a run file is: itself, or one for each member of its stage."""
    section = config.stage if isinstance(config, StageConfig) else None
    if not isinstance(section, EnsembleSection) or section.members == 1:
        return [config]
    chosen = range(section.members) if section.member is None else [section.member]
    return [_member(config, number) for number in chosen]


def name_in_file(config: AnyConfig) -> str:
    """The name that the file gives to what `config` is or is a member of."""
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
