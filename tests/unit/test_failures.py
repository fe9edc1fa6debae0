"""Which errors of a living learner rank are a loss, and which end the run."""

from __future__ import annotations

import datetime
import errno
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist

from rlhf_cluster import errors
from rlhf_cluster.errors import (
    CoreLost,
    RankFailed,
    RlhfError,
    StalledError,
    WeightError,
)
from rlhf_cluster.failures import (
    MAX_TEXT,
    as_rank_failure,
    is_group_failure,
    is_retryable,
    may_pass,
)

HashStore = dist.HashStore  # pyright: ignore[reportPrivateImportUsage]
ProcessGroupGloo = dist.ProcessGroupGloo  # pyright: ignore[reportPrivateImportUsage]
OF_TORCH = [
    torch.OutOfMemoryError("CUDA out of memory"),
    dist.DistBackendError("NCCL error: unhandled cuda error"),
    dist.DistNetworkError("The client socket has timed out"),
    dist.DistStoreError("wait timeout after 60000ms"),
]
OURS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, RlhfError) and kind is not RlhfError
]


@pytest.mark.parametrize("error", OF_TORCH, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("starting", [True, False])
def test_what_torch_says_of_devices_and_the_network_may_pass(error: Exception, starting: bool):
    found = as_rank_failure(error, starting)
    assert type(found) is RankFailed
    assert str(found) == f"{type(error).__name__}: {error}"


def two_ranks(timeout_s: float) -> list[Any]:
    """Two process groups of gloo that know each other, in this process."""
    store, timeout = HashStore(), datetime.timedelta(seconds=timeout_s)
    with ThreadPoolExecutor(2) as threads:
        made = [threads.submit(ProcessGroupGloo, store, rank, 2, timeout) for rank in range(2)]
        return [each.result() for each in made]


def test_a_collective_that_hangs_and_one_whose_peer_is_gone_may_pass():
    """What gloo raises is a plain RuntimeError; NCCL's watchdog ends the process, which is a death."""
    ranks = two_ranks(0.2)
    with pytest.raises(RuntimeError) as hung:
        ranks[0].allreduce([torch.ones(4)]).wait()
    ranks = two_ranks(60.0)
    ranks.pop()
    with pytest.raises(RuntimeError) as alone:
        ranks[0].allreduce([torch.ones(4)]).wait()
    assert "imed out" in str(hung.value)
    for error in (hung.value, alone.value):
        assert type(as_rank_failure(error)) is RankFailed


@pytest.mark.parametrize(
    "error",
    [RuntimeError("Timed out waiting 60000ms for recv"), ConnectionResetError(104, "reset")],
)
def test_what_gloo_and_the_host_say_may_pass_but_at_the_first_setup(error: Exception):
    assert type(as_rank_failure(error)) is RankFailed
    assert as_rank_failure(error, starting=True) is error, "most likely of what the rank was given"


@pytest.mark.parametrize(
    "error",
    [
        TypeError("no"),
        ValueError("no"),
        KeyError("no"),
        AssertionError("no"),
        NotImplementedError("no"),
        RecursionError("no"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_an_error_of_the_program_comes_again(error: Exception):
    assert as_rank_failure(error) is error
    assert as_rank_failure(error, starting=True) is error


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_of_our_own_errors_only_a_passed_deadline_may_pass(kind: type[RlhfError]):
    error = kind("learner rank 1: what, bound, cure")
    assert may_pass(error) == (kind in (StalledError, RankFailed))
    found = as_rank_failure(error)
    assert (type(found) is RankFailed) == (kind in (StalledError, RankFailed))


def test_memory_of_the_host_may_pass():
    assert str(as_rank_failure(MemoryError())) == "MemoryError"


def test_a_judged_error_stays_what_it_is_and_crosses_processes_in_bounds():
    found = as_rank_failure(RuntimeError("first line\n   second " + "x" * 10 * MAX_TEXT))
    assert as_rank_failure(found) is found
    copy = pickle.loads(pickle.dumps(found))
    assert type(copy) is RankFailed
    assert str(copy) == str(found)
    assert str(copy).startswith("RuntimeError: first line second xxx")
    assert len(str(copy)) < MAX_TEXT + 50
    assert not isinstance(copy, CoreLost), "whether another process is gone is asked first"


ENDS_RUN, ELSEWHERE, ONLY_ELSEWHERE, DISCARD = (
    (False, False),
    (True, True),
    (True, False),
    (False, True),
)
OF_A_CALL = {
    "ConfigError": ENDS_RUN,
    "SeveralProblems": ENDS_RUN,
    "DataError": ELSEWHERE,
    "RecordError": ELSEWHERE,
    "PlacementError": ENDS_RUN,
    "StalenessError": ENDS_RUN,
    "StalledError": ONLY_ELSEWHERE,  # a `WorkerError` after the last try
    "WeightError": ONLY_ELSEWHERE,
    "FencedError": ENDS_RUN,
    "CheckpointError": ENDS_RUN,
    "StoreError": ENDS_RUN,
    "StorageError": ENDS_RUN,
    "WorkerError": ELSEWHERE,
    "WorkerDied": ELSEWHERE,
    "WorkerSilent": ELSEWHERE,
    "RecordLost": DISCARD,
    "PoolLost": ENDS_RUN,
    "RankFailed": ENDS_RUN,
    "CoreLost": ENDS_RUN,
    "ScoringError": ELSEWHERE,
    "RunError": ENDS_RUN,
    "DivergenceError": ENDS_RUN,
    "MetricError": ENDS_RUN,
}
"""Whether another worker is tried, and whether the error is a discard after the last try."""


def test_d05_every_error_has_its_place_in_the_table_of_a_call():
    found = {
        kind.__name__: (is_retryable(kind("why")), is_group_failure(kind("why"))) for kind in OURS
    }
    assert found == OF_A_CALL, "decide it here, and in the docstring of rlhf_cluster.failures"


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.EIO, "Input/output error"), WeightError),
        (OSError(errno.ENOSPC, "No space left on device"), WeightError),
        (StalledError("the write took longer than 60 s"), WeightError),
        (WeightError("a shard is torn"), WeightError),
        (RuntimeError("CUDA error"), RankFailed),
    ],
)
def test_n06_a_storage_that_fails_or_is_slow_costs_a_published_version_and_not_the_learner(
    error: Exception, raised: type[Exception]
) -> None:
    from actors.services.rank_actors import failing_as_a_version, judging

    @judging
    @failing_as_a_version
    def commit() -> None:
        raise error

    with pytest.raises(raised, match=str(error).rpartition("] ")[2]):
        commit()
