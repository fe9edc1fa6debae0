"""The begin of an attempt: what a store that is held by somebody else means for the run."""

from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import pytest

from actors.drivers import training_attempt
from rlhf_cluster.errors import CoreLost, WeightError
from rlhf_cluster.run.restarts import Restarts, with_recovery
from rlhf_cluster.weights import store
from rlhf_cluster.weights.writer_fence import commit_lock


async def test_n09_a_store_that_a_lost_rank_still_holds_costs_a_restart_and_not_the_run(tmp_path):
    """The node of rank 0 died in a commit: its lock is given away after the lease."""
    holder = commit_lock(tmp_path)
    holder.__enter__()
    told: list[str] = []

    def begin(root: Path) -> Any:
        return store.begin_attempt(root, lock_timeout_s=0.05)

    def attempt() -> Awaitable[Any]:
        return training_attempt.on_store(tmp_path, 300.0, begin, tmp_path)

    async def recover(lost: Exception) -> None:
        assert isinstance(lost, CoreLost)
        told.append(str(lost))
        holder.__exit__(None, None, None)

    async def sleep(seconds: float) -> None:
        return None

    restarts = Restarts(limit=1)
    writer = await with_recovery(attempt, recover, restarts, told.append, sleep)
    assert writer.attempt == 1
    assert restarts.used == 1
    assert len(told) == 1
    assert "another commit has held the lock" in told[0]


async def test_what_would_come_again_is_raised_as_it_is(tmp_path):
    def refuse() -> None:
        raise WeightError("damaged for good")

    with pytest.raises(WeightError, match="damaged for good"):
        await training_attempt.on_store(tmp_path, 300.0, refuse)
