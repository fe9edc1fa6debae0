"""Calls to a cluster that is silent, refuses, is starting, is down, or is none."""

import http.server
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from actors.jobs.dashboard_calls import (
    connect,
    once_agents_are_up,
    within,
)
from rlhf_cluster.errors import RunError, StalledError
from tests.support.builders.cluster_jobs import FakeTime

TIMEOUT_S = 60.0
NO_AGENT = "No available agent to submit job, please try again later."


def test_a_silent_cluster_runs_into_the_deadline():
    never = threading.Event()
    with pytest.raises(StalledError, match=r"the list of jobs: no answer .* within 0\.05 s"):
        within(0.05, "the list of jobs", never.wait)
    never.set()


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        (RuntimeError("401 unauthorized"), "the list of jobs: the cluster answered: 401"),
        (ConnectionError("connection aborted"), "the list of jobs: no answer: connection aborted"),
    ],
)
def test_what_a_call_fails_with_is_passed_on(failure, said):
    def fail():
        raise failure

    with pytest.raises(RunError, match=said):
        within(5.0, "the list of jobs", fail)


@contextmanager
def server(answer: bytes) -> Iterator[str]:
    """The address of one that says `answer` to whoever connects."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(answer)

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{found.server_port}"
        found.shutdown()
        thread.join(10)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\n\r\n", r"\(HTTP 404 Not Found\)"),
        (b"\x00\x00\x18\x04\x00\x00\x00", r"\(no HTTP: BadStatusLine\)"),
    ],
)
def test_a_port_of_something_else_is_no_dashboard(answer, said):
    with (
        server(answer) as address,
        pytest.raises(RunError, match=f"{address}: .* no Ray dashboard {said}.*8265.*6379"),
    ):
        connect(address)


def test_an_address_that_nobody_listens_at_is_named():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RunError, match=f"127.0.0.1:{port}: no Ray dashboard answers"):
        connect(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://head:10001", "auto", ""])
def test_an_address_of_another_kind_is_refused(address):
    with pytest.raises(RunError, match="expected the address of the Ray dashboard"):
        connect(address)


class YoungCluster(FakeTime):
    """Refuses jobs until `start_s`; each refusal takes it `attempt_s`."""

    def __init__(self, start_s: float, refusal: str, attempt_s: float = 0.0) -> None:
        super().__init__()
        self.start_s, self.refusal, self.attempt_s = start_s, refusal, attempt_s

    def send(self) -> str:
        if self.now_s >= self.start_s:
            return "job-1"
        self.now_s += self.attempt_s
        raise RunError(f"the cluster answered: Request failed with status code 500: {self.refusal}")


@pytest.mark.parametrize("start_s", [0.0, 2.5, 59.0])
@pytest.mark.parametrize(
    "refusal",
    [
        NO_AGENT,
        "TimeoutError: Failed to get head node agent within 10 seconds.",
        "aiohttp.client_exceptions.ClientConnectorError: Cannot connect to host 10.0.0.1:52365",
    ],
)
def test_a_job_is_sent_again_until_an_agent_is_up(start_s, refusal):
    cluster = YoungCluster(start_s, refusal)
    assert once_agents_are_up(cluster.send, TIMEOUT_S, cluster.waiting) == "job-1"
    assert start_s <= cluster.now_s < start_s + 2
    assert len(cluster.said) == (start_s > 0), "that it waits is said once"
    assert all("waiting for it, 60 s at most" in line for line in cluster.said)


@pytest.mark.parametrize("attempt_s", [0.0, 10.0])
def test_a_cluster_that_takes_no_jobs_for_too_long_is_told_what_it_lacks(attempt_s):
    cluster = YoungCluster(1e9, NO_AGENT, attempt_s)
    with pytest.raises(
        StalledError, match=r"after 60 s: the agent .* head node .*52365.*dashboard_agent\.log"
    ):
        once_agents_are_up(cluster.send, TIMEOUT_S, cluster.waiting)
    assert TIMEOUT_S <= cluster.now_s <= TIMEOUT_S + attempt_s + 1


def test_another_refusal_is_final():
    cluster = YoungCluster(1e9, "no such file")
    with pytest.raises(RunError, match="no such file"):
        once_agents_are_up(cluster.send, TIMEOUT_S, cluster.waiting)
    assert (cluster.now_s, cluster.said) == (0.0, [])
