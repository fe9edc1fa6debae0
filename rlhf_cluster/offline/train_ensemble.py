"""Several models of one stage: the units that each of them trains on, and the report on all of them.

    members = 3        the stage is run three times, one after the other (`config.load`):
    NAME/NAME-0 ...    a run directory per member, with its checkpoints, report and final model
    NAME/report.json   report on all members, written by the one that finishes last

Splits divide the units that are not held out. They depend on a hash of a unit's key (the opening
prompt), so they are the same whatever the order of the files:

    leave_out    member k never sees the k-th of `members` equal parts
    bootstrap    each key appears n times, n drawn from a Poisson distribution of mean 1: the
                 bootstrap of streams (Oza and Russell 2001, "Online bagging and boosting")
    same         everything; the members differ by seed alone

Promises:
- the held-out units are the same for all members, and no member trains on them;
- each member has a different seed for order and first weights;
- the report on all members is of scores of the same units, else it is not written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.offline.scorer_report import (
    Scored,
    ensemble_report,
)
from rlhf_cluster.sections.offline_stage import StageSectionBase
from rlhf_cluster.util.durable_files import write_json

SCORES = "held_out.json"
"""File in a member's run directory with its scores of every held-out unit."""
REPORT = "report.json"

Split = Literal["leave_out", "bootstrap", "same"]


class EnsembleSection(StageSectionBase):
    """Keys of a stage that can train several models."""

    members: PositiveInt = 1
    """Number of models that the stage trains, one after the other, each with a different seed.

    The models of a stage NAME are runs NAME-0, NAME-1, ... below the folder NAME.
    """
    split: Split = "leave_out"
    """Units that each of several members trains on.

    `leave_out`: all but one part, a different one for each member. `bootstrap`: a bootstrap sample.
    `same`: all.
    """
    member: int | None = Field(default=None, ge=0)
    """Index, from 0, of the only member to train, such as on a separate machine. Default: all."""

    @model_validator(mode="after")
    def _member_is_one_of_them(self) -> EnsembleSection:
        if self.member is not None and self.member >= self.members:
            raise ValueError(
                f"member = {self.member} with members = {self.members}: members are counted from 0. "
                "Raise members, or lower member"
            )
        if self.members == 1 and self.split == "bootstrap":
            raise ValueError(
                "split = 'bootstrap' with members = 1: one model trains on everything. Raise members, "
                "or remove split"
            )
        return self


def check_single(section: EnsembleSection) -> None:
    """Check that a section describes one model. Raises `ConfigError` for several.

    `config.load` makes the sections of single members, which can be trained.
    """
    if section.members > 1 and section.member is None:
        raise ConfigError(
            f"stage.members = {section.members} and no stage.member: one run trains one member. Start "
            "the file with `rlhf-cluster run`, which trains all, or set stage.member"
        )


def times(section: EnsembleSection, key: str) -> int:
    """Return the number of times that one pass over the data has a unit with this key."""
    if section.member is None or section.members == 1 or section.split == "same":
        return 1
    if section.split == "leave_out":
        return int(xxh3_64_intdigest(f"part/{key}".encode()) % section.members != section.member)
    return _poisson(xxh3_64_intdigest(f"{section.member}/{key}".encode()) / 2**64)


def conclude(
    section: EnsembleSection, units: Sequence[Unit], scored: Scored, folder: Path
) -> dict[str, Any] | None:
    """Write a member's scores into its run directory, and the report on all members once all have one.

    Args:
        units: [P] held-out units, in the order of `scored`.
        scored: their scores by this member.

    Returns:
        The report on all members, which is in the parent of the run directories. None for a stage of
        one model, while scores of a member are missing, and if a member scored other units.
    """
    names = [xxh3_64_hexdigest(unit.content.encode()) for unit in units]
    write_json(folder / SCORES, {"units": names, **scored.as_dict()})
    if section.members == 1 or section.member is None:
        return None
    found = _of_all(section, folder)
    if found is None:
        return None
    report = ensemble_report(found)
    write_json(folder.parent / REPORT, report)
    return report


def _of_all(section: EnsembleSection, folder: Path) -> list[Scored] | None:
    """Read the scores of all members. None while one is missing or scored other units."""
    base = folder.name.removesuffix(f"-{section.member}")
    found: list[Mapping[str, Any]] = []
    for number in range(section.members):
        try:
            text = (folder.parent / f"{base}-{number}" / SCORES).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        found.append(json.loads(text))
    if any(other["units"] != found[0]["units"] for other in found):
        return None
    return [Scored.from_dict(values) for values in found]


def _poisson(share: float) -> int:
    """Return the n whose cumulated probability passes `share`, for a Poisson distribution of mean
    1."""
    count, below, own = 0, math.exp(-1), math.exp(-1)
    while share >= below and count < 32:
        count += 1
        own /= count
        below += own
    return count
