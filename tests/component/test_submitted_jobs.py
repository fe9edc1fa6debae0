"""A run as a job of a cluster, from the command line: submit, follow, scale, logs, stop.

The cluster is a head of its own with a dashboard, started as a user would start it. Jobs run the
real engine: nothing of the tests is sent with them.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tomli_w
from ray.util.state import list_actors

from rlhf_cluster.cli.commands import main
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import Snapshot
from tests.support.builders.run_configs import tiny_tree
from tests.support.servers.job_cluster import started_head, wait_until

REPOSITORY = Path(__file__).parents[2]
OURS = {"ControlActor", "BufferActor", "RankActor", "GenerationActor", "ScoringActor"}
RUN_S = 240.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """The address of the dashboard of a cluster that lives as long as this module's tests."""
    with started_head({}) as address:
        yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("jobs")
    tree = tiny_tree(run={"steps": 2}, evaluation={"num_prompts": 8})
    (folder / "run.toml").write_text(tomli_w.dumps(tree))
    return folder


@pytest.fixture(scope="module")
def live(dashboard: str, folder: Path) -> Path:
    """The directory of a submitted run without an end, once it trains."""
    assert submit(dashboard, folder, "live", "run.steps=1000000") == 0
    wait_until(lambda: status_of(folder / "live").step >= 1, "a step", RUN_S)
    return folder / "live"


def submit(dashboard: str, folder: Path, name: str, *overrides: str, follow: bool = False) -> int:
    words = ["submit", str(folder / "run.toml"), "--address", dashboard, "--run-id", name]
    for override in (f"run.root={folder}", *overrides):
        words += ["--set", override]
    return main(words + ["--follow"] * follow)


def status_of(path: Path) -> Snapshot:
    status = RunDir.open(path).read_status() if (path / "run.lock").exists() else None
    return status or Snapshot(run="", state="starting", step=0, num_steps=1, time_s=0, reward=None)


def workers(path: Path) -> dict[str, int]:
    return {pool.name: pool.alive for pool in status_of(path).pools}


def actors_of_runs(dashboard: str) -> list[str]:
    alive = list_actors(address=dashboard, filters=[("state", "=", "ALIVE")], limit=1000)
    return sorted(actor.class_name for actor in alive if actor.class_name in OURS)


def test_a_submitted_run_can_be_followed_to_its_end(dashboard, folder, capsys):
    assert submit(dashboard, folder, "short", follow=True) == 0, capsys.readouterr()
    output = capsys.readouterr().out
    for text in ("submitted job ", "step 2/2", "Run short finished: 2 steps", "8 held-out prompts"):
        assert text in output
    assert (folder / "short" / "final" / "model.safetensors").exists()
    assert main(["status", "short", "--address", dashboard]) == 0
    assert "SUCCEEDED" in capsys.readouterr().out
    assert actors_of_runs(dashboard) == []


def test_a_job_that_fails_ends_with_its_own_error(dashboard, folder, capsys):
    assert submit(dashboard, folder, "bad", "data.max_prompt_tokens=3", follow=True) == 1
    error = capsys.readouterr().err
    assert "ended: FAILED. error: task sort_digits: 256 of 256 prompts are longer" in error
    assert error.count("\n") == 1
    assert not (folder / "bad").exists()


def test_a_live_run_is_not_submitted_twice(dashboard, folder, live, capsys):
    assert submit(dashboard, folder, "live") == 1
    error = capsys.readouterr().err
    assert "run 'live' is already running as job raysubmit_" in error
    assert "--run-id" in error


def test_a_submitted_run_is_scaled_by_its_directory_and_through_the_dashboard(
    dashboard, live, capsys
):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_cluster.cli", "scale", str(live), "generation=2"],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=RUN_S,
    )
    assert (done.returncode, done.stdout) == (0, "  generation  2 workers\n"), done.stderr
    wait_until(lambda: workers(live)["generation"] == 2, "the status shows them", 20)
    assert main(["scale", "live", "generation=1", "--address", dashboard]) == 0
    assert capsys.readouterr().out == "  generation  1 workers\n"
    wait_until(lambda: workers(live)["generation"] == 1, "the status shows it", 20)
    step = status_of(live).step
    wait_until(lambda: status_of(live).step > step, "the run goes on", RUN_S)


def test_the_logs_of_a_job_are_its_drivers(dashboard, live, capsys):
    assert main(["logs", "live", "--address", dashboard, "--tail", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert any("reward" in line and "tokens/s" in line for line in lines)


def test_a_stopped_job_leaves_its_record_and_no_actors(dashboard, live, capsys):
    assert actors_of_runs(dashboard) == sorted(OURS)
    assert main(["stop", "live", "--address", dashboard]) == 0
    assert capsys.readouterr().out == "live: stopped\n"
    assert status_of(live).state == "stopped"
    assert not RunDir.open(live).is_held()
    wait_until(lambda: actors_of_runs(dashboard) == [], "all actors are gone", 30)
    assert main(["stop", "live", "--address", dashboard]) == 1
    assert "has already ended: STOPPED" in capsys.readouterr().err
    assert main(["scale", "live", "generation=2", "--address", dashboard]) == 1
    assert "Only a live run can be scaled" in capsys.readouterr().err
