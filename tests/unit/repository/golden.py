"""What users and stored runs rely on, as one dump: configuration, metrics, commands, file formats.

    python -m tests.unit.repository.golden        # write golden.json again, after a change on purpose

Descriptions of configuration keys are left out: prose may change. Everything else is a contract; the
commit that changes it says why.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

from rlhf_cluster.observe.metric_table import Metric

DUMP = Path(__file__).with_name("golden.json")


def dump() -> dict[str, Any]:
    from rlhf_cluster.buffer import group_file
    from rlhf_cluster.config import GenerateConfig, RunConfig, StageConfig
    from rlhf_cluster.observe.metric_table import METRICS
    from rlhf_cluster.run.checkpoint import run_state
    from rlhf_cluster.weights.manifest import Manifest

    files = (RunConfig, StageConfig, GenerateConfig)
    return {
        "configuration": {c.__name__: without_prose(c.model_json_schema()) for c in files},
        "metrics": {name: contract(metric) for name, metric in METRICS.items()},
        "commands": commands(),
        "manifest": without_prose(Manifest.model_json_schema()),
        "group file": {"format": group_file.FORMAT},
        "run state": {
            "format": run_state.FORMAT,
            "fields": [field.name for field in dataclasses.fields(run_state.RunState)],
        },
    }


def contract(metric: Metric) -> dict[str, Any]:
    """Whatever a dashboard or an alert relies on: all but the help, which docs/metrics.md shows."""
    return {key: value for key, value in dataclasses.asdict(metric).items() if key != "help"}


def without_prose(value: Any) -> Any:
    """A JSON schema without descriptions and without the titles that pydantic makes of names."""
    if isinstance(value, dict):
        return {
            key: without_prose(inner)
            for key, inner in value.items()
            if not (key in ("description", "title") and isinstance(inner, str))
        }
    return [without_prose(inner) for inner in value] if isinstance(value, list) else value


def commands() -> dict[str, list[str]]:
    """Help of every command, line by line."""
    import typer
    from typer.testing import CliRunner

    from rlhf_cluster.cli.commands import app

    names = ["", *sorted(typer.main.get_command(app).commands)]  # type: ignore[attr-defined]
    found = {}
    for name in names:
        words = [*filter(None, [name]), "--help"]
        terminal = {"COLUMNS": "100", "TERM": "dumb", "NO_COLOR": "1"}
        output = CliRunner().invoke(app, words, env=terminal).output
        plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
        found[f"rlhf-cluster {name}".strip()] = [line.rstrip() for line in plain.splitlines()]
    return found


def as_text(found: dict[str, Any]) -> str:
    return json.dumps(found, indent=1, sort_keys=True, default=str) + "\n"


if __name__ == "__main__":
    DUMP.write_text(as_text(dump()))
