"""Listing of a run's experience, one line per group: for `rlhf-cluster inspect`.

    stored groups    experience/*.arrow        whole groups of the last steps, and open ones
    samples          samples/step-*.parquet    of each step the first rollouts, whole run

Promises: every stored group is read whole and verified; a file that is damaged is named and not shown.
A group that is in both is shown once, from the store. Nothing is changed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from rlhf_cluster.buffer.group_recovery import read_trained
from rlhf_cluster.buffer.group_store import ExperienceStore
from rlhf_cluster.errors import StoreError
from rlhf_cluster.observe.record.samples import read_samples
from rlhf_cluster.records import ExperienceGroup

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text."""

_LONGEST = 60
"""Characters of a text that a line shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRow:
    """Row of the listing: one group. `source` is "store" or "sample".

    `steps` trained the group: several where it was replayed, none while it is open.
    """

    group_id: str
    prompt_id: str
    oldest_version: int
    newest_version: int
    reward: float  # mean of the rollouts shown
    num_rollouts: int
    num_tokens: int
    steps: tuple[int, ...]
    source: str
    prompt: str = ""
    response: str | None = None  # of the first rollout; None where it cannot be decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFilter:
    """Filter of groups; a field that is None matches every group.

    `version` matches from a group's oldest to its newest.
    """

    prompt: str | None = None
    version: int | None = None
    min_reward: float | None = None
    max_reward: float | None = None
    step: int | None = None

    def has(self, row: GroupRow) -> bool:
        return (
            self.prompt in (None, row.prompt_id)
            and (self.version is None or row.oldest_version <= self.version <= row.newest_version)
            and (self.min_reward is None or row.reward >= self.min_reward)
            and (self.max_reward is None or row.reward <= self.max_reward)
            and (self.step is None or self.step in row.steps)
        )


@dataclass(frozen=True, slots=True)
class Listing:
    """Groups by id. `damaged` has a message for each file that cannot be used."""

    rows: list[GroupRow] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)


def list_groups(
    run_dir: Path, wanted: GroupFilter, limit: int | None = None, decode: Decode | None = None
) -> Listing:
    """Return the first `limit` groups that match `wanted`, by group id. Reads every stored file.

    `decode` turns the token ids of stored responses into text.
    """
    found = Listing()
    store = ExperienceStore(run_dir / "experience")
    steps = read_trained(store.root)
    rows: dict[str, GroupRow] = {}
    for number in store.numbers():
        try:
            row = _row(store.read(number), steps.get(number, ()), decode)
        except StoreError as error:
            found.damaged.append(str(error))
        else:
            rows[row.group_id] = row
    for path in sorted((run_dir / "samples").glob("step-*.parquet")):
        try:
            sampled = list(_read_rows(path))
        except (OSError, ValueError, KeyError) as error:
            found.damaged.append(f"{path}: cannot be read as samples ({error})")
        else:
            for row in sampled:
                known = rows.setdefault(row.group_id, row)
                steps_of_both = tuple(sorted({*known.steps, *row.steps}))
                rows[row.group_id] = replace(known, steps=steps_of_both)
    found.rows.extend([rows[name] for name in sorted(rows) if wanted.has(rows[name])][:limit])
    return found


def lines_of(rows: Sequence[GroupRow]) -> list[str]:
    """Return a heading and a line per row.

    Below a row stand the prompt and the first response, shortened.

    A group that no step trained is open, or was discarded; a replayed one has the steps of all uses.
    """
    cells = [("group", "prompt", "versions", "reward", "rollouts", "tokens", "step", "from")]
    for row in rows:
        versions = f"{row.oldest_version}..{row.newest_version}"
        step = ",".join(map(str, row.steps)) or "open"
        numbers = (f"{row.reward:.4g}", str(row.num_rollouts), str(row.num_tokens))
        cells.append((row.group_id, row.prompt_id, versions, *numbers, step, row.source))
    heading, *lines = align(cells)
    texts = [f"    {short(row.prompt)} -> {short(row.response)}" for row in rows]
    return [heading, *(text for pair in zip(lines, texts, strict=True) for text in pair)]


def short(text: str | None) -> str:
    """Return a text in quotes on one line, at most `_LONGEST` characters of it; "-" without one."""
    if text is None:
        return "-"
    cut = text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."
    return json.dumps(escape_control(cut), ensure_ascii=False)


def escape_control(text: str) -> str:
    """Return `text` as a terminal may have it, with control characters written out."""
    return re.sub(
        r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]",
        lambda match: f"\\x{ord(match[0]):02x}",
        text,
    )


def align(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line per row, its cells in columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _row(group: ExperienceGroup, steps: tuple[int, ...], decode: Decode | None) -> GroupRow:
    source = group.prompt.source
    rollouts = [scored.rollout for scored in group.scored]
    return GroupRow(
        group_id=group.group_id,
        prompt_id=group.prompt.prompt_id,
        oldest_version=min(int(r.versions.min()) for r in rollouts),
        newest_version=max(int(r.versions.max()) for r in rollouts),
        reward=sum(s.reward for s in group.scored) / len(rollouts),
        num_rollouts=len(rollouts),
        num_tokens=sum(len(r.response_ids) for r in rollouts),
        steps=steps,
        source="store",
        prompt=source if isinstance(source, str) else json.dumps(source, ensure_ascii=False),
        response=None if decode is None else decode(rollouts[0].response_ids.tolist()),
    )


def _read_rows(path: Path) -> Iterator[GroupRow]:
    samples = sorted(read_samples(path), key=lambda sample: sample["group_id"])
    for group_id, own in groupby(samples, key=lambda sample: sample["group_id"]):
        rollouts = list(own)
        yield GroupRow(
            group_id=group_id,
            prompt_id=rollouts[0]["prompt_id"],
            oldest_version=min(r["version_min"] for r in rollouts),
            newest_version=max(r["version_max"] for r in rollouts),
            reward=sum(r["reward"] for r in rollouts) / len(rollouts),
            num_rollouts=len(rollouts),
            num_tokens=sum(len(r["response_ids"]) for r in rollouts),
            steps=(int(path.stem.removeprefix("step-")),),
            source="sample",
            prompt=rollouts[0]["prompt"],
            response=rollouts[0]["response"],
        )
