"""Reading a version beside the work of a process."""

import threading

import pytest

from rlhf_cluster.errors import WeightError
from rlhf_cluster.weights.read_version import Staging
from rlhf_cluster.weights.transports.transport import Deadline

FOUND = {"digest": "d", "num_tensors": 3}


def soon() -> Deadline:
    return Deadline("reading version 7", 30.0)


def ended(staging: Staging) -> Staging:
    assert staging._reading is not None
    staging._reading.join(30.0)
    assert not staging._reading.is_alive()
    return staging


def test_a_report_is_none_until_the_read_is_over():
    staging, let_go = Staging(), threading.Event()

    def read():
        let_go.wait(30)
        return FOUND

    assert staging.report() is None
    assert staging.begin(read, soon()) is None
    assert staging.report() is None
    let_go.set()
    assert ended(staging).report() == FOUND
    assert staging.begin(lambda: {"digest": "e"}, soon()) is None, "the next one"
    assert ended(staging).report() == {"digest": "e"}


def test_a_read_that_hangs_refuses_the_next_one_and_its_report_is_not_the_next_ones():
    staging, let_go = Staging(), threading.Event()

    def hangs():
        let_go.wait(30)
        return FOUND

    staging.begin(hangs, soon())
    refused = staging.begin(lambda: {"digest": "new"}, soon())
    assert refused is not None
    assert "still being read" in refused["error"]
    let_go.set()
    ended(staging)
    assert staging.begin(lambda: {"digest": "new"}, soon()) is None
    assert ended(staging).report() == {"digest": "new"}


def test_a_cancelled_read_ends_at_its_next_look():
    staging, reads = Staging(), threading.Event()
    deadline = soon()

    def read():
        reads.set()
        while True:
            deadline.left_s()

    staging.begin(read, deadline)
    assert reads.wait(30)
    staging.cancel()
    assert "was cancelled" in ended(staging).report()["error"]  # type: ignore[index]


@pytest.mark.parametrize("error", [WeightError("torn"), MemoryError("no room"), ValueError("x")])
def test_what_a_read_raises_is_its_report(error):
    staging = Staging()

    def read():
        raise error

    staging.begin(read, soon())
    assert ended(staging).report() == {"error": f"{type(error).__name__}: {error}"}
