"""The data set as a file, and the report on it.

Promises:
- the file appears as a whole;
- its rows are in the order of the prompts, whatever the order in which these were finished;
- the report accounts for every response and every prompt.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_cluster.config.dataset_config import GenerateSection
from rlhf_cluster.errors import DataError
from rlhf_cluster.synthetic_data.answers_file import (
    Answer,
    Answers,
    in_order,
)
from rlhf_cluster.synthetic_data.revision_rows import (
    SELECTIONS,
    RevisionReport,
)
from rlhf_cluster.synthetic_data.select_rows import (
    LEFT_OUT,
    Row,
    rows_of,
    step_labels,
)
from rlhf_cluster.util.durable_files import write_atomically


@dataclass(slots=True)
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass(slots=True, kw_only=True)
class Report:
    """Sums over all prompts that `write_dataset` reads."""

    section: GenerateSection
    prompts: int = 0
    rows: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    highest: float | None = None
    means: dict[str, _Mean] = field(default_factory=dict)
    samples: int = 0
    revisions: RevisionReport = field(default_factory=RevisionReport)

    def add(self, group: Answers, rows: list[Row], taken: list[Answer], left: Counter[str]) -> None:
        self.prompts += 1
        self.rows += len(rows)
        self.left_out += left
        for name, answers in (("", group.answers), ("selected_", taken)):
            for answer in answers:
                self._mean(f"{name}reward", answer.reward)
                self._mean(f"{name}tokens", answer.num_tokens)
                for part, value in answer.parts.items():
                    self._mean(f"{name}part/{part}", value)
        self.samples += len(group.answers) + len(group.unrevised)
        rewards = [answer.reward for answer in group.answers]
        if rewards:
            self._mean("best_reward", max(rewards))
            self.highest = max(rewards if self.highest is None else [*rewards, self.highest])
        if self.section.select in SELECTIONS:
            self.revisions.add(group)
        for row in rows:
            if "margin" in row:
                self._mean("margin", row["margin"])
        if self.section.select == "step_labels":
            for answer in taken:
                for label in step_labels(answer, self.section.threshold or 0.0):
                    self._mean("label", label)

    def document(self, discarded: Mapping[str, int]) -> dict[str, Any]:
        """Return counts and means for report.json; `discarded` counts prompts by reason."""

        def mean(name: str) -> float | None:
            return self.means[name].value if name in self.means else None

        parts = sorted(name for name in self.means if name.startswith("part/"))
        return {
            "select": self.section.select,
            "prompts": self.prompts,
            "discarded": dict(discarded),
            "samples": self.samples,
            "rows": self.rows,
            "left_out": {name: self.left_out[name] for name in LEFT_OUT},
            "reward_mean": mean("reward"),
            "best_reward_mean": mean("best_reward"),
            "selected_reward_mean": mean("selected_reward"),
            "tokens_mean": mean("tokens"),
            "selected_tokens_mean": mean("selected_tokens"),
            "margin_mean": mean("margin"),
            "labels": self.means["label"].count if "label" in self.means else 0,
            "label_mean": mean("label"),
            "parts": {
                name.removeprefix("part/"): {
                    "mean": mean(name),
                    "selected": mean(f"selected_{name}"),
                }
                for name in parts
            },
            "revisions": self.revisions.document() if self.section.select in SELECTIONS else None,
        }

    def _mean(self, name: str, value: float) -> None:
        self.means.setdefault(name, _Mean()).add(value)


def write_dataset(
    groups: Path, target: Path, section: GenerateSection, discarded: Mapping[str, int]
) -> dict[str, Any]:
    """Write the rows of all answers in `groups` to `target`, and return the report.

    Raises `DataError` for a damaged file, a file that cannot be written, or no row at all.
    """
    report = Report(section=section)
    try:
        with write_atomically(target) as file:
            for group in in_order(groups):
                rows, taken, left = rows_of(group, section)
                report.add(group, rows, taken, left)
                for row in rows:
                    text = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
                    file.write(text.encode())
            if not report.rows:
                raise DataError(_explain_nothing(report, discarded))
    except OSError as error:
        raise DataError(
            f"{target}: cannot be written ({error}). Free space there, and give the same command "
            "again: no prompt is sampled again"
        ) from error
    return report.document(discarded)


def _explain_nothing(report: Report, discarded: Mapping[str, int]) -> str:
    left = ", ".join(
        f"{count} {LEFT_OUT[name]}" for name, count in report.left_out.items() if count
    )
    lost = ", ".join(f"{count} by {name}" for name, count in discarded.items()) or "none"
    highest = "no reward" if report.highest is None else f"highest reward {report.highest:g}"
    return (
        f"stage.select = {report.section.select!r} took nothing of {report.prompts} prompts "
        f"({highest}; left out: {left or 'nothing'}; discarded prompts: {lost}). Change [stage] and "
        "give the command again with --accept-changes: the answers that are there are kept"
    )
