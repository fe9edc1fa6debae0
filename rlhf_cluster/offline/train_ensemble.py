"""Several models of one stage: which units each of them trains on, and what they are worth together.

    members = 3        the stage is run three times, one after the other (`config.chain`):
    NAME/NAME-0 ...    a run directory each, with checkpoints, report and final model of its own
    NAME/report.json   of all together, written by the one that finishes last

Splits, of the units that are not held out, by a hash of their key (the opening prompt) and so the same
whatever the order of the files:

    leave_out    member k never sees the k-th of `members` equal parts
    bootstrap    each key is there n times, n drawn from a Poisson distribution of mean 1: the
                 bootstrap of streams (Oza and Russell 2001, "Online bagging and boosting")
    same         everything; the members differ by seed alone

Promises: the held-out units are the same for all members and in no one's training; each member has a
seed of its own for order and first weights; the report is of scores of the same units, or says why not.
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
from rlhf_cluster.util.json_files import write_json

SCORES = "held_out.json"
"""In a member's run directory: its scores of every held-out unit."""
REPORT = "report.json"

Split = Literal["leave_out", "bootstrap", "same"]


class EnsembleSection(StageSectionBase):
    """Keys of a stage that can train several models."""

    members: PositiveInt = 1
    """Models that the stage trains, one after the other, each with a seed of its own. Those of a stage
    NAME are runs NAME-0, NAME-1, ... below the folder NAME."""
    split: Split = "leave_out"
    """What each of several members trains on: all but a part of its own, a bootstrap sample, or the
    same."""
    member: int | None = Field(default=None, ge=0)
    """Train this member alone, from 0, such as on a machine of its own; default: all of them."""

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
    """Raises `ConfigError` for a section that stands for several models: it cannot be trained as it
    is, only what `config.chain` makes of it."""
    if section.members > 1 and section.member is None:
        raise ConfigError(
            f"stage.members = {section.members} and no stage.member: one run trains one member. Start "
            "the file with `rlhf-cluster run`, which trains all, or set stage.member"
        )


def times(section: EnsembleSection, key: str) -> int:
    """How often one pass over the data has a unit with this key."""
    if section.member is None or section.members == 1 or section.split == "same":
        return 1
    if section.split == "leave_out":
        return int(xxh3_64_intdigest(f"part/{key}".encode()) % section.members != section.member)
    return _poisson(xxh3_64_intdigest(f"{section.member}/{key}".encode()) / 2**64)


def conclude(
    section: EnsembleSection, units: Sequence[Unit], scored: Scored, folder: Path
) -> dict[str, Any] | None:
    """Leave a member's scores in its run directory, and the report of all members beside these when
    they are there; returns that report, None before.

    Args:
        units: [P] held-out units, in the order of `scored`.
        scored: their scores by this member.
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
    """The scores of all members, None while one is missing or scored other units."""
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
    """The number n of a Poisson distribution of mean 1 whose cumulated probability passes `share`."""
    count, below, own = 0, math.exp(-1), math.exp(-1)
    while share >= below and count < 32:
        count += 1
        own /= count
        below += own
    return count
