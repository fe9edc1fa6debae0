"""What the bottleneck advisor foretells against what one more worker gives, in real runs.

Each case is a run on a local Ray whose bottleneck is made. The run's own forecast is read, then the
pool is enlarged by `rlhf-cluster scale`, in the same run. Cases:

    generation, scoring    engines or rewards that sleep, one group at a time, so that no core is shared
    learner                one with more to compute than the pools take
    roomy                  engines that are as fast with many groups as with one

Figures, by case:

    foretold_gain              `advisor/gain/POOL` of the last step before the pool is enlarged
    sure_gain                  the least of the range that the advice gives beside it
    measured_gain              steps per second after it, settled, over those before it
    measured_over_foretold     of the two
    names_it                   1 where the advice named the bottleneck that was made

    python benchmarks/advisor.py                # all cases
    python benchmarks/advisor.py generation     # one of them
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import tomli_w

from benchmarks.harness import ENVIRONMENT, machine, write_result
from rlhf_cluster.run.bottleneck_advisor import advise
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot, read_metrics
from tests.support.builders.run_configs import tiny_tree
from tests.support.engines.scripted_engine import SCRIPT_VARIABLE

REPOSITORY = Path(__file__).parents[1]
ENGINE = "tests.support.engines.scripted_engine:make_engine"
GROUPS = 8  # a step
SETTLING = 4  # steps that are left out at the start and after the pool has its new size
COUNTED = 16  # steps whose rate is taken, on either side
WITHIN_S = 240.0
LOOK_S = 0.1

Record = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """`bound` is the station made slow, `grows` the pool that gets a second worker."""

    bound: str
    grows: str
    generate_s: float = 0.0  # a group, of an engine
    in_turn: bool = True  # an engine takes one group at a time, else all that it is given
    score_s: float = 0.0  # a group, of a scoring worker
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


CASES = {
    "generation": Case(bound="generation", grows="generation", generate_s=0.12, score_s=0.02),
    "scoring": Case(bound="scoring", grows="scoring", generate_s=0.02, score_s=0.12),
    "roomy": Case(
        bound="generation", grows="generation", generate_s=0.96, in_turn=False, score_s=0.02
    ),
    "learner": Case(
        bound="learner",
        grows="generation",
        generate_s=0.02,
        score_s=0.01,
        sections={
            "model": {"init": {"hidden_size": 512, "num_layers": 6, "intermediate_size": 1024}},
            "algorithm": {"type": "grpo", "group_size": 16},
        },
    ),
}


def slow_reward(
    prompts: Sequence[str], completions: Sequence[str], seconds: float, **columns: object
) -> list[float]:
    """Takes so many seconds, computes nothing to speak of, and gives different rewards."""
    time.sleep(seconds)
    return [float(sum(map(ord, text)) % 3) for text in completions]


def settled(records: Sequence[Record], pool: str, workers: int) -> list[Record]:
    """The steps that `pool` made with so many workers, less the first `SETTLING` of them."""
    steps = [r for r in records if r.get("time/step_s") is not None]
    return [r for r in steps if r.get(f"pool/size/{pool}") == workers][SETTLING:]


def steps_per_s(steps: Sequence[Record]) -> float:
    """Between the ends of the first and of the last. `SystemExit` under `COUNTED` steps, or where one
    of those between is missing: that is no rate."""
    if len(steps) < COUNTED:
        raise SystemExit(f"{len(steps)} settled steps, expected at least {COUNTED}; no rate")
    first, last = steps[0], steps[-1]
    if last["step"] - first["step"] != len(steps) - 1:
        raise SystemExit(f"steps {first['step']} to {last['step']} are not {len(steps)}; no rate")
    return (len(steps) - 1) / (last["time_s"] - first["time_s"])


def compared(records: Sequence[Record], pool: str) -> dict[str, float]:
    """Of one run, whose `pool` had one worker and then two."""
    before, after = settled(records, pool, 1), settled(records, pool, 2)
    rates = steps_per_s(before), steps_per_s(after)
    foretold = before[-1].get(f"advisor/gain/{pool}")
    if foretold is None:
        raise SystemExit(f"step {before[-1]['step']} foretells nothing of {pool}")
    gain = rates[1] / rates[0]
    return {
        "foretold_gain": foretold,
        "measured_gain": gain,
        "measured_over_foretold": gain / foretold,
        "steps_per_s_before": rates[0],
        "steps_per_s_after": rates[1],
    }


def tree_of(case: Case, name: str, folder: Path) -> dict[str, Any]:
    """The run file. A reward's child process scores one group at a time."""
    reward = {
        "type": "python",
        "function": "benchmarks.advisor:slow_reward",
        "kwargs": {"seconds": case.score_s},
    }
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": name, "root": str(folder), "steps": 100_000, "groups_per_step": GROUPS},
        "scoring": {"rewards": [reward]},
        "staleness": {"max_staleness": 2, "pipeline_depth": 2},
        "checkpoint": {"every": 100_000},
        "cluster": {"num_cpus": 4},
        "observe": {"live": False},
    }
    return tiny_tree(**sections, **{k: dict(section) for k, section in case.sections.items()})


class Running:
    """A run as its own process, on a Ray of its own."""

    def __init__(self, case: Case, name: str, folder: Path) -> None:
        self.path, self._output = folder / name, folder / f"{name}.out"
        config = folder / f"{name}.toml"
        config.write_text(tomli_w.dumps(tree_of(case, name, folder)), encoding="utf-8")
        script = {"generate_delay_s": case.generate_s, "in_turn": case.in_turn}
        self._environment = {
            **{key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
            **ENVIRONMENT,
            "PYTHONPATH": str(REPOSITORY),
            SCRIPT_VARIABLE: json.dumps(script),
        }
        with self._output.open("wb") as out:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.support.engines.run_with_engine",
                    str(config),
                    ENGINE,
                ],
                cwd=REPOSITORY,
                env=self._environment,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    @property
    def records(self) -> list[Record]:
        path = self.path / "metrics.jsonl"
        return list(read_metrics(path)) if path.exists() else []

    @property
    def status(self) -> Snapshot | None:
        held = (self.path / "run.lock").exists()
        return RunDir.open(self.path).read_status() if held else None

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """`SystemExit` when the run ends before, or after `WITHIN_S`."""
        ends = time.monotonic() + WITHIN_S
        while not done():
            if time.monotonic() > ends or self._process.poll() is not None:
                text = self._output.read_text(errors="replace")[-2000:]
                raise SystemExit(f"{self.path.name}, not within {WITHIN_S:g} s: {what}\n{text}")
            time.sleep(LOOK_S)

    def wait_for_steps(self, pool: str, workers: int) -> None:
        self.wait(
            lambda: len(settled(self.records, pool, workers)) >= COUNTED,
            f"{COUNTED} settled steps with {workers} {pool} worker(s)",
        )

    def scale(self, pool: str, workers: int) -> None:
        """As a user does it."""
        command = [sys.executable, "-m", "rlhf_cluster.cli", "scale", str(self.path)]
        subprocess.run(
            [*command, f"{pool}={workers}"],
            cwd=REPOSITORY,
            env=self._environment,
            check=True,
            timeout=WITHIN_S,
        )

    def close(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(120)
        except subprocess.TimeoutExpired:
            self._process.kill()


def measure(case: Case, name: str, folder: Path) -> dict[str, Any]:
    run = Running(case, name, folder)
    try:
        run.wait_for_steps(case.grows, 1)
        status, advice = run.status, advise(run.records)
        run.scale(case.grows, 2)
        run.wait_for_steps(case.grows, 2)
        records = run.records
    finally:
        run.close()
    if status is None or advice is None:
        raise SystemExit(f"{name}: the run gives no advice")
    if (stale := max(r["staleness/max"] for r in records if "staleness/max" in r)) > 2:
        raise SystemExit(f"{name}: staleness {stale:g} over the bound of 2; no speed to report")
    return {
        "grows": case.grows,
        "bound": advice.bound,
        "names_it": float(advice.bound == case.bound),
        "advice": status.advice,
        "sure_gain": advice.ranges[case.grows][0],
        "load": {"step_s": advice.load.step_s, "turns": advice.load.turns, **advice.load.demand},
        **compared(records, case.grows),
    }


def figures(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    names = ("foretold_gain", "sure_gain", "measured_gain", "measured_over_foretold", "names_it")
    return {f"{case}/{name}": run[name] for case, run in runs.items() for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("cases", nargs="*", choices=[*CASES, "all"], default="all")
    asked = parser.parse_args().cases
    names = list(CASES) if "all" in asked else asked
    before = machine()
    with tempfile.TemporaryDirectory(prefix="advisor-") as folder:
        for name in names:
            run = {name: measure(CASES[name], name, Path(folder))}
            print(run, flush=True)
            write_result("advisor", figures(run), run, machine=before)


if __name__ == "__main__":
    main()
