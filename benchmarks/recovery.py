"""How long a run stands still when one of its processes is killed. Real vLLM, on the CPU.

The quick start's model and sizes, with one worker a pool, so that nobody else does the work of the one
that is gone. Each repeat kills every role once, by SIGKILL, under a run that trains. A figure is the
time from the kill until the role is whole again AND a step has been finished after that: the notice,
the new process, its imports, its engine or model, its weights, and one step.

    generation, scoring   one worker, replaced by the supervisor
    learner, buffer       both are started again, from the newest checkpoint, under the living pools
    controller            the control channel, opened anew by the driver; no step waits for it
    driver                all of the run goes with it; until the same command has finished a step

A second run has a hot spare of the learner, and loses only learners, each once the spare is ready.

    python benchmarks/recovery.py --repeats 3
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.harness import ENVIRONMENT, machine, spread, write_result
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, read_metrics
from tests.chaos.processes import Process, marked

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "configs" / "quickstart.toml"
CLASSES = {
    "generation": "GenerationActor",
    "scoring": "ScoringActor",
    "learner": "RankActor",
    "buffer": "BufferActor",
    "controller": "ControlActor",
}
ROLES = (*CLASSES, "driver")
SETTINGS = (
    "run.steps=1000000",
    "sft.steps=0",
    "evaluation.num_prompts=0",
    "checkpoint.every=5",
    "learner.max_restarts=1000",
    "cluster.max_restarts=1000",
)
WITHIN_S = 300.0
LOOK_S = 0.05


class Victim:
    """One run, found in /proc by its own folder in PYTHONPATH."""

    def __init__(self, folder: Path, *settings: str) -> None:
        self._folder, self._settings = folder, settings
        self._path = folder / "recovery"
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        settings = (f"run.root={self._folder}", "run.name=recovery", *SETTINGS, *self._settings)
        overrides = [word for setting in settings for word in ("--set", setting)]
        command = [sys.executable, "-m", "rlhf_cluster.cli", "run", str(QUICKSTART), *overrides]
        path = f"{REPOSITORY}{os.pathsep}{self._folder}"
        with (self._folder / "output.txt").open("ab") as out:
            return subprocess.Popen(
                command,
                cwd=REPOSITORY,
                env={**os.environ, **ENVIRONMENT, "PYTHONPATH": path},
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def status(self) -> Snapshot | None:
        held = (self._path / "run.lock").exists()
        return RunDir.open(self._path).read_status() if held else None

    @property
    def last_step_s(self) -> float:
        """When the newest step was finished, unix time; 0 before the first."""
        records = read_metrics(self._path / "metrics.jsonl")
        return max((r["time_s"] for r in records if "time/step_s" in r), default=0.0)

    def last(self, metric: str) -> float:
        """Its newest value, 0 before the first."""
        records = read_metrics(self._path / "metrics.jsonl")
        return next((r[metric] for r in reversed(records) if r.get(metric) is not None), 0.0)

    def process_of(self, role: str) -> Process:
        """The longest at work: a spare that is ready is younger than the rank."""
        name = f"ray::{CLASSES[role]}"
        found = [p for p in marked(str(self._folder)) if p.command().startswith(name)]
        return min(found, key=lambda process: process.started)

    def wait(self, done: Callable[[Snapshot], bool], what: str) -> None:
        ends = time.monotonic() + WITHIN_S
        while True:
            status = self.status
            if status is not None and done(status):
                return
            if time.monotonic() > ends or self.process.poll() is not None:
                text = (self._folder / "output.txt").read_text()[-2000:]
                raise SystemExit(f"not within {WITHIN_S:g} s: {what}\n{status}\n{text}")
            time.sleep(LOOK_S)

    def wait_for_a_step(self, after_s: float) -> None:
        self.wait(lambda s: s.state == "running" and self.last_step_s > after_s, "a step")

    def settle(self) -> None:
        """Waits for: two steps, and a checkpoint."""
        for _ in range(2):
            self.wait_for_a_step(time.time())
        self.wait(lambda s: s.checkpoint is not None, "a checkpoint")

    def wait_for_a_spare(self) -> None:
        self.wait(lambda s: self.last("learner/spares_ready") > 0, "a spare is ready")

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            self.process.kill()


def recovery_s(run: Victim, role: str) -> float:
    """Seconds from the kill of one process of `role` to the first step of the mended run."""
    before = run.status
    assert before is not None
    started = time.time()
    if role == "driver":
        run.process.send_signal(signal.SIGKILL)
        run.process.wait(30)
        run.process = run.start()
    else:
        os.kill(run.process_of(role).pid, signal.SIGKILL)
        run.wait(_mended(run, role, before), f"the {role} is there again")
    run.wait_for_a_step(time.time() if role != "driver" else started)
    return time.time() - started


def _mended(run: Victim, role: str, before: Snapshot) -> Callable[[Snapshot], bool]:
    if role == "controller":
        opened = run.last("control/restarts_total")
        return lambda s: run.last("control/restarts_total") > opened
    if role in ("learner", "buffer"):
        return lambda s: s.restarts > before.restarts and s.state == "running"
    replaced = {pool.name: pool.restarts for pool in before.pools}

    def whole(status: Snapshot) -> bool:
        (pool,) = (p for p in status.pools if p.name == role)
        return pool.restarts > replaced[role] and pool.alive == pool.wanted

    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds that a killed process costs.")
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    os.environ.update(ENVIRONMENT)
    before = machine()
    runs: dict[str, list[float]] = {role: [] for role in ROLES}
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        run = Victim(Path(folder))
        try:
            for _ in range(repeats):
                for role in ROLES:
                    run.settle()
                    runs[role].append(round(recovery_s(run, role), 2))
                    print(role, runs[role], flush=True)
        finally:
            run.close()
    runs["learner with a spare"] = _with_a_spare(repeats)
    named = {role.replace(" ", "_"): times for role, times in runs.items()}
    figures = {f"{role}_s": spread(times)["median"] for role, times in named.items()}
    figures |= {f"{role}_max_s": max(times) for role, times in named.items()}
    figures["spare_over_none"] = figures["learner_with_a_spare_s"] / figures["learner_s"]
    write_result("recovery", figures, {"recovery": runs}, machine=before)


def _with_a_spare(repeats: int) -> list[float]:
    found = []
    with tempfile.TemporaryDirectory(prefix="recovery-") as folder:
        run = Victim(Path(folder), "learner.spares=1")
        try:
            for _ in range(repeats):
                run.settle()
                run.wait_for_a_spare()
                found.append(round(recovery_s(run, "learner"), 2))
                print("learner with a spare", found, flush=True)
        finally:
            run.close()
    return found


if __name__ == "__main__":
    main()
