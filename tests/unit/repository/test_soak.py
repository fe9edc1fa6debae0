"""What the soak measures, and what it makes of it, without a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.chaos.processes import descendants, of_pid
from tests.soak.run import BOUNDS, LASTING, figures
from tests.soak.sampling import name_of, of_disk, of_processes
from tests.soak.trends import Sample, theil_sen, trends, violations

STEPS = 2000


def samples_of(**series: object) -> list[Sample]:
    """A sample each 20 steps of functions of the step; None where there is nothing to measure."""
    found = []
    for step in range(1, STEPS, 20):
        values = {name.replace("__", "/"): f(step) for name, f in series.items()}  # type: ignore[operator]
        found.append(Sample(step=step, values={n: v for n, v in values.items() if v is not None}))
    return found


def noise(step: int) -> float:
    return float(np.random.default_rng(step).normal(0, 3))


def test_the_slope_is_the_median_of_all_pairs_and_few_peaks_do_not_move_it() -> None:
    assert theil_sen([0, 1, 2, 2], [1, 3, 5, 5]) == 2
    assert np.isnan(theil_sen([4, 4], [1, 2]))
    x = np.arange(100.0)
    y = 5 - 0.25 * x
    y[::5] += 1000
    assert theil_sen(x.tolist(), y.tolist()) == pytest.approx(-0.25, abs=0.02)


def test_a_leak_under_noise_is_named_with_its_numbers_and_what_is_flat_is_not() -> None:
    samples = samples_of(
        heap_mib__driver=lambda step: 300 + 0.02 * step + noise(step),
        heap_mib__learner=lambda step: 500 + noise(step + STEPS),
        files__driver=lambda step: 40.0 + (step < 400) * step,  # a warm-up of a third
        disk_mib__weights=lambda step: 9.0 if step % 3 else 12.0,
        heap_mib__scoring=lambda step: 90 + 10 * (1 - np.exp(-step / 500)),
    )
    [wrong] = violations(samples, STEPS, BOUNDS, LASTING)
    assert wrong.startswith("heap_mib/driver: grows by ")
    assert wrong.endswith("; the bound is 8")
    found = trends(samples, STEPS)
    assert found["heap_mib/driver"].slope == pytest.approx(20, abs=2)
    assert found["heap_mib/driver"].late == pytest.approx(20, abs=4)
    assert found["disk_mib/weights"].peak == 12
    filling = found["heap_mib/scoring"]
    assert 0 < filling.late < filling.slope / 1.5, "what fills up grows less and less"
    counts = figures(samples, STEPS, 10.0, 1)
    assert counts["slope/heap_mib"] == round(found["heap_mib/driver"].slope, 3)
    assert (counts["processes"], counts["violations"]) == (3, 1)


def test_a_process_that_came_or_went_and_a_series_without_a_bound_are_named() -> None:
    samples = samples_of(
        heap_mib__buffer=lambda step: 100.0 if step < 1500 else None,
        files__buffer=lambda step: 20.0 if step < 1500 else None,
        heap_mib__driver=lambda step: 100.0,
        handles__driver=lambda step: 1.0,
    )
    found = violations(samples, STEPS, BOUNDS, LASTING)
    assert found == [
        "handles/driver: no bound is stated for handles",
        "heap_mib/buffer: came or went; it is not in 25 of 66 samples",
    ]
    assert "only 6 samples" in violations(samples[:40], STEPS, BOUNDS)[0]


def test_memory_and_open_files_are_those_of_the_process(tmp_path: Path) -> None:
    script = (
        "import sys; x = bytearray(64 << 20); f = open(sys.argv[1]); print(flush=True); input()"
    )
    (tmp_path / "file").touch()
    command = [sys.executable, "-S", "-c", script, str(tmp_path / "file")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert child.pid in descendants(os.getpid())
        process = of_pid(child.pid)
        assert process is not None
        values = of_processes([process])
        child.kill()
    assert values.keys() == {"heap_mib/driver-0", "shared_mib/driver-0", "files/driver-0"}
    assert 64 <= values["heap_mib/driver-0"] < 128
    assert values["files/driver-0"] >= 4
    assert of_processes([process]) == {}, "it is gone"


def test_processes_are_told_apart_by_their_commands() -> None:
    assert name_of("ray::GenerationActor.generate", of_run=True) == "generation"
    assert name_of("ray::ControlActor", of_run=False) == "control", "it has no mark of its run"
    assert name_of("ray::Other.call", of_run=True) == "Other"
    assert (
        name_of("python -m tests.support.engines.run_with_engine run.toml", of_run=True) == "driver"
    )
    assert name_of("ray::IDLE", of_run=True) is name_of("ray::IDLE", of_run=False) is None
    assert name_of("/x/raylet/raylet --raylet_socket_name=y", of_run=False) == "ray/raylet"
    assert name_of("/x/python -u /x/log_monitor.py --dir=z", of_run=False) == "ray/log_monitor"
    assert name_of("ray::DashboardAgent", of_run=False) == "ray/DashboardAgent"


def test_the_disk_is_counted_by_store_and_by_record(tmp_path: Path) -> None:
    for name, num_bytes in {
        "weights/v1/a": 2 << 20,
        "weights/v1/b": 1 << 20,
        "samples/step-1.parquet": 1 << 20,
        "status.json": 1 << 19,
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(num_bytes))
    values = of_disk(tmp_path)
    assert (values["disk_mib/weights"], values["disk_files/weights"]) == (3, 2)
    assert (values["record_mib/samples"], values["disk_mib/others"]) == (1, 0.5)
    assert values["disk_files/checkpoints"] == 0
    kinds = {name.rpartition("/")[0] for name in values}
    assert kinds <= BOUNDS.keys()
