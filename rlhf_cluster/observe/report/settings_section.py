"""Settings of a report: of one run the main ones, then all; of several those that differ."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rlhf_cluster.observe.report.html_text import table, text
from rlhf_cluster.observe.report.read_run import RunRecord

MAIN = (
    "stage.type", "algorithm.type", "algorithm.proximal", "algorithm.group_size", "model.path",
    "model.init.architecture", "model.init.hidden_size", "data.task", "data.path", "scoring.rewards",
    "run.steps", "run.groups_per_step", "run.seed", "learner.learning_rate", "learner.ranks",
    "stage.learning_rate", "stage.epochs", "stage.steps", "staleness.max_staleness",
    "generation.workers", "generation.temperature", "generation.max_response_tokens",
    "evaluation.num_prompts",
)  # fmt: skip


def settings(run: RunRecord) -> Iterator[str]:
    """Yield the main settings of a run, and all of them to unfold."""
    flat = dict(_flat(run.config))
    yield table((name, _plain(flat[name])) for name in MAIN if flat.get(name, "null") != "null")
    if flat:
        rows = table(sorted(flat.items()))
        yield f"<details><summary>all {len(flat):,} settings</summary>{rows}</details>"


def _plain(setting: str) -> str:
    """Return a setting without the quotes of a text; of rewards, their names or types."""
    value = json.loads(setting)
    if isinstance(value, list):
        named = [v.get("name") or v.get("type") if isinstance(v, Mapping) else v for v in value]
        return ", ".join(str(name) for name in named)
    return str(value)


def differences(runs: Sequence[RunRecord]) -> Iterator[str]:
    """Yield the settings in which the runs differ."""
    flat = [dict(_flat(run.config)) for run in runs]
    names = sorted({name for settings in flat for name in settings} - {"run.name", "run.root"})
    rows = [(name, [settings.get(name, "-") for settings in flat]) for name in names]
    rows = [(name, values) for name, values in rows if len(set(values)) > 1]
    if not rows:
        return
    heads = "".join(f"<th>{text(run.name)}</th>" for run in runs)
    yield f'<div class="wide"><table><tr><th>setting</th>{heads}</tr>'
    for name, values in rows:
        cells = "".join(f"<td>{text(value)}</td>" for value in values)
        yield f"<tr><th>{text(name)}</th>{cells}</tr>"
    yield "</table></div>"


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value, ensure_ascii=False, default=str)
