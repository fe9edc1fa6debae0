"""Make a run that died between two checkpoints, as an archive that later code must resume.

    python tests/component/old_runs/make.py COMMIT OUT.tar.xz [RUNNER ENGINE]

Run it from the root of a checkout of COMMIT with the environment of that checkout. RUNNER is the
module that runs a file with a scripted engine, ENGINE the engine's factory. The archive holds the run
directory with `formats.json`: the commit and the number of each format of its files. Paths of the
machine are replaced by `@ROOT@`.
"""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import tomli_w

STEPS = 6
NAME = "old"
ROOT = "@ROOT@"
TEXT = {".json", ".jsonl", ".log", ".stacks", ".toml", ".lock"}
TREE = {
    "run": {"name": NAME, "root": ".", "steps": STEPS, "groups_per_step": 2},
    "model": {"init": {"hidden_size": 32, "num_layers": 1, "num_heads": 1}},
    "data": {"task": "sort_digits", "max_prompt_tokens": 8},
    "algorithm": {"type": "grpo", "group_size": 4, "kl_coef": 0.01},
    "generation": {
        "max_response_tokens": 8,
        "dtype": "float32",
        "num_cpus": 0.25,
        "kv_cache_bytes": 32 << 20,
        "enforce_eager": True,
    },
    "scoring": {
        "rewards": [{"type": "exact_match"}],
        "dtype": "float32",
        "num_cpus": 0.25,
        "reference": True,
    },
    "learner": {"learning_rate": 1e-3, "dtype": "float32", "num_cpus": 0.25},
    "staleness": {"max_staleness": 0, "pipeline_depth": 0},
    "checkpoint": {"every": 2, "keep": 1},
    "observe": {"live": False, "samples_per_step": 2},
}


def formats(run: Path) -> dict[str, int]:
    """Numbers of the formats of the run's own files."""
    state = next((run / "checkpoints").glob("step-*/run.json"))
    group = next((run / "experience").glob("*.arrow")).read_bytes()
    found = re.search(rb"group format=(\d+)", group)
    assert found is not None
    return {"run_state": json.loads(state.read_text())["format"], "group": int(found[1])}


def died_run(folder: Path, runner: str, engine: str) -> Path:
    """Start a run in `folder` and kill it after a step beyond its first checkpoint."""
    (folder / "run.toml").write_text(tomli_w.dumps(TREE))
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path.cwd()),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", runner, "run.toml", engine],
        cwd=folder,
        env=environment,
        start_new_session=True,
    )
    run, deadline = folder / NAME, time.monotonic() + 300
    try:
        while not beyond_checkpoint(run):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the run ended with {process.poll()}, or took over 300 s")
            time.sleep(0.01)
    finally:
        process.kill()  # Ray ends the cluster that only this driver had
        process.wait(30)
    return run


def beyond_checkpoint(run: Path) -> bool:
    metrics = run / "metrics.jsonl"
    if not (run / "checkpoints" / "step-000002").exists() or not metrics.exists():
        return False
    return any('"step": 3' in line or '"step":3' in line for line in metrics.open())


def pack(run: Path, commit: str, out: Path) -> None:
    about = {"commit": commit, "steps": STEPS, "formats": formats(run)}
    (run / "formats.json").write_text(json.dumps(about, indent=1))
    with tarfile.open(out, "w:xz") as archive:
        for path in sorted(p for p in run.rglob("*") if p.is_file()):
            content = path.read_bytes()
            if path.suffix in TEXT:
                content = content.replace(str(run.parent.absolute()).encode(), ROOT.encode())
            entry = tarfile.TarInfo(str(Path(NAME) / path.relative_to(run)))
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def main() -> None:
    commit, out, *rest = sys.argv[1:]
    runner, engine = rest or (
        "tests.support.engines.run_with_engine",
        "tests.support.engines.scripted_engine:make_engine",
    )
    with tempfile.TemporaryDirectory() as folder:
        pack(died_run(Path(folder), runner, engine), commit, Path(out).absolute())


if __name__ == "__main__":
    main()
