"""What is read of a job: a line of what happened, and the end of its log, however long that is."""

import pytest

from actors.jobs.dashboard_calls import (
    LINE_CHARS,
    LOG_LINES,
    last_lines,
    log_tail,
    message_of,
)
from rlhf_cluster.errors import RunError
from tests.support.builders.cluster_jobs import (
    FakeClient,
    make_job,
)

FAILED = "Job entrypoint command failed with exit code 1"
LAST_LOGS = f"{FAILED}, last available logs (truncated to 20,000 chars):\n"
TRACEBACK = 'Traceback (most recent call last):\n  File "cli.py", line 18\nImportError: typer\n'


def failed(message: str | None):
    job = make_job("job-1", "tiny", "FAILED")
    job.message = message
    return job


@pytest.mark.parametrize(
    ("message", "said"),
    [
        (LAST_LOGS + TRACEBACK, f"{FAILED}: ImportError: typer"),
        (LAST_LOGS + "step 1\nerror: no room\n\n", "error: no room"),
        (f"{FAILED}. No logs available.", f"{FAILED}. No logs available."),
        ("Job supervisor actor died: the node\nwas lost", "Job supervisor actor died: the node"),
        ("", None),
        (None, None),
    ],
)
def test_a_failed_job_says_in_a_line_why(message, said):
    assert message_of(failed(message)) == said


def test_the_log_of_a_command_that_failed_is_read_from_the_job_itself():
    client = FakeClient()
    assert last_lines(failed(LAST_LOGS + TRACEBACK), client) == TRACEBACK.splitlines()
    assert client.tails == [], "the node that ran it may be gone"


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_of_another_job_only_the_end_of_the_log_is_read(status):
    client = FakeClient(text="\n".join(f"line {n}" for n in range(1000)))
    job = make_job("job-1", "tiny", status)
    assert last_lines(job, client) == [f"line {n}" for n in range(990, 1000)]
    assert client.tails == [("job-1", "node-1", LOG_LINES)]


def test_a_progress_bar_and_an_endless_line_are_cut():
    bar = "".join(f"\r{n} %" for n in range(100))
    client = FakeClient(text=f"{bar}\n\n{'x' * 10_000}")
    lines = last_lines(make_job("job-1", "tiny", "RUNNING"), client)
    assert lines[-2:] == ["99 %", "x" * LINE_CHARS]
    assert len(lines) <= LOG_LINES


@pytest.mark.parametrize("status", ["PENDING", "SUCCEEDED", "STOPPED"])
def test_no_log_is_read_of_a_job_that_waits_or_ended_well(status):
    client = FakeClient(text="a line")
    assert last_lines(make_job("job-1", "tiny", status), client) == []
    assert client.tails == []


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_a_job_that_no_node_has_started_has_no_log(status):
    job, client = make_job("job-1", "tiny", status), FakeClient(text="a line")
    job.driver_node_id = None
    assert last_lines(job, client) == log_tail(job, client, 5) == []


def test_a_log_that_cannot_be_read_leaves_a_status():
    class Lost(FakeClient):
        def get_log_tail(self, job_id: str, node_id: str, num_lines: int) -> str:
            raise RuntimeError("Request failed with status code 500: node is dead\nTraceback ...")

    job = make_job("job-1", "tiny", "FAILED")
    [line] = last_lines(job, Lost())
    assert line.endswith("status code 500: node is dead")
    with pytest.raises(RunError, match="node is dead"):
        log_tail(job, Lost(), 5)
