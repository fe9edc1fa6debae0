"""Reading what a run leaves, with nothing of the product: JSON lines, logs, tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

LINE = re.compile(r"^(\S+Z) [A-Z]+ \S+ \S+ [\w.]+: (.*)$")


@dataclass(frozen=True, slots=True)
class LogLine:
    time: str  # UTC, ISO 8601: sorts as text
    text: str


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def read_metrics(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_log(path: Path) -> list[LogLine]:
    if not path.is_file():
        return []
    found = map(LINE.match, path.read_text(encoding="utf-8", errors="replace").splitlines())
    return [LogLine(match[1], match[2]) for match in found if match]


def not_finite(path: Path) -> Iterator[str]:
    with safe_open(str(path), framework="np") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a mapping
            if not np.isfinite(tensors.get_tensor(name).astype(np.float64)).all():
                yield name


def ranges(steps: Sequence[int]) -> str:
    """`steps 3, 5 to 9` of rising numbers."""
    parts: list[list[int]] = []
    for step in steps:
        if parts and step == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], step]
        else:
            parts.append([step])
    return "steps " + ", ".join(" to ".join(map(str, part)) for part in parts)
