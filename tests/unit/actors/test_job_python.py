"""The Python that a job runs with is the one that a small job before it tells."""

import os
import sys

import pytest

from actors.jobs import python_probe
from actors.jobs.jobs import (
    PROBE_TIMEOUT_S,
    cluster_python,
)
from rlhf_cluster.errors import RunError, StalledError
from tests.support.builders.cluster_jobs import (
    ADDRESS,
    PROBE,
    PYTHON,
    FakeClient,
    FakeTime,
    told,
)


def ask(client: FakeClient, folder, time: FakeTime | None = None) -> str:
    return cluster_python(client, str(folder), ADDRESS, (time or FakeTime()).waiting)


def test_the_python_is_the_one_of_the_process_that_ray_starts_and_not_of_the_path(tmp_path):
    client = FakeClient()
    assert ask(client, tmp_path) == PYTHON
    [(entrypoint, _, variables)] = client.probes
    assert entrypoint == '"${RLHF_JOB_PYTHON:-python}" -m actors.jobs.python_probe'
    assert "actors.jobs.python_probe.tell" in variables.values(), "it leaves RLHF_JOB_PYTHON"


def test_a_python_that_cannot_run_this_project_is_named_with_the_cause_and_the_cure(tmp_path):
    missing = "ModuleNotFoundError: No module named 'typer'"
    client = FakeClient(probe_text=told("/usr/bin/python3", missing))
    with pytest.raises(
        RunError, match=r"/usr/bin/python3 \(Python 3\.11\.7\).*'typer'. Start Ray .* not submitted"
    ):
        ask(client, tmp_path)


def test_a_small_job_that_fails_is_quoted(tmp_path):
    client = FakeClient(probe_state="FAILED", probe_text="/bin/sh: 1: python: not found\n")

    def end(c: FakeClient) -> None:
        c.jobs[0].message = (
            "Job entrypoint command failed with exit code 127, last available logs (truncated):\n"
            "/bin/sh: 1: python: not found\n"
        )

    client.script = [end]
    with pytest.raises(
        RunError, match="is FAILED: .* exit code 127: /bin/sh: 1: python: not found"
    ):
        ask(client, tmp_path)


def test_a_job_that_the_cluster_does_not_start_is_an_error_and_not_a_wait_for_ever(tmp_path):
    client, time = FakeClient(probe_state="PENDING"), FakeTime()
    with pytest.raises(StalledError, match=r"PENDING after 120 s \(message of job-probe\)"):
        ask(client, tmp_path, time)
    assert client.stopped == [PROBE]
    assert PROBE_TIMEOUT_S < time.now_s < PROBE_TIMEOUT_S + 1


def test_the_probe_tells_the_python_that_it_runs_with(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(python_probe.VARIABLE, "to be replaced")
    python_probe.tell()
    python_probe.main()
    assert ask(FakeClient(probe_text=capsys.readouterr().out), tmp_path) == sys.executable
    assert os.environ[python_probe.VARIABLE] == sys.executable


def test_the_probe_tells_an_old_python_before_it_imports_anything():
    assert python_probe.missing((3, 10)) == "it is older than Python 3.11"
