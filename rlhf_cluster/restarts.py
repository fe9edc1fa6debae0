"""A run goes on after a learner rank or the buffer is lost: how often, after which pause, from what.

    attempt --CoreLost--> recover, pause --> attempt, from the newest checkpoint --> ...
            --RoomAgain--> recover --> attempt, with all ranks, from the checkpoint just written
            --any other failure--> the end of the run

Learner ranks and buffer hold one cut of the run between them, so all of them go back to a cut that
was written down. Generation and scoring hold nothing of it, and stay. A loss is a process that died, or
is silent past a deadline, and an error of a rank that lives which may pass (`failures` has the table).

Promises:
- only a loss is tried again; what would come again (diverged numbers, refused weights, wrong settings)
  ends the run at once;
- going back to all ranks is no loss: it costs no restart;
- losses are counted within a window of time, those of a start too; the one over `limit` ends the run
  with the first of them;
- nothing that a user asked to keep is deleted: a run that was told to write no checkpoints, or whose
  checkpoints are all damaged, is not begun anew once it has done a step.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TypeVar

from rlhf_cluster.checkpoint import continuing
from rlhf_cluster.checkpoint.folder import Checkpoint
from rlhf_cluster.config.either import AnyConfig
from rlhf_cluster.errors import CheckpointError, CoreLost, PlacementError, RlhfError
from rlhf_cluster.observe.run_log import read_metrics
from rlhf_cluster.restart_window import RestartWindow
from rlhf_cluster.rundir import RunDir

T = TypeVar("T")

MAX_PAUSE_S = 60.0


class RoomAgain(RlhfError):
    """An attempt with fewer ranks than asked ended at a checkpoint, since there is room for all."""


@dataclass(slots=True, kw_only=True)
class Restarts:
    """The budget: at most `limit` restarts within a window, the first after `pause_s`, each later one
    there after twice as long as the one before, up to `MAX_PAUSE_S`. `what` is lost, in the error."""

    limit: int
    what: str = "learner or buffer"
    pause_s: float = 1.0
    window: RestartWindow = field(default_factory=RestartWindow)

    @property
    def used(self) -> int:
        """All since the start of the run."""
        return self.window.total

    def spend(self, lost: RlhfError) -> float:
        """One restart more, because of `lost`; the seconds to wait before it. Raises `CoreLost`."""
        recent = self.window.recent
        if recent >= self.limit:
            first = self.window.first_cause or lost
            raise CoreLost(
                f"{self.what} lost {recent + 1} times within {self.window.window_s:g} s, over "
                f"learner.max_restarts = {self.limit}. First cause: {first}. Last: {lost}"
            ) from lost
        self.window.count(lost)
        return min(MAX_PAUSE_S, self.pause_s * 2.0 ** min(recent, 30))


async def with_recovery(
    attempt: Callable[[], Awaitable[T]],
    recover: Callable[[RlhfError], Awaitable[None]],
    restarts: Restarts,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """What `attempt` returns. After a loss `recover` brings all else to a state to go on from.

    That there is no room counts as a loss once there was one: what died may still hold it.
    """
    while True:
        try:
            return await attempt()
        except RoomAgain as error:
            await recover(error)
            continue
        except CoreLost as error:
            lost: RlhfError = error
        except PlacementError as error:
            if not restarts.used:
                raise
            lost = error
        pause_s = restarts.spend(lost)
        await recover(lost)
        await sleep(pause_s)


def point_of_return(
    run: RunDir,
    config: AnyConfig,
    lost: RlhfError,
    sleep: Callable[[float], None] = time.sleep,
) -> Checkpoint | None:
    """From where the run goes on after `lost`: its newest whole checkpoint, or the copy of a newer one
    that is damaged, or, with None, from the beginning. Reads all of the checkpoint; call while holding
    `run`. Raises `CheckpointError`, `StorageError` and `StalledError` rather than go back further than
    it has to."""
    found = continuing.whole_or_copy(run, config, sleep)
    if found.checkpoint is not None:
        return found.checkpoint
    records = read_metrics(run.metrics)
    done = records[-1]["step"] if records else 0
    if found.damaged or (done and not config.checkpoint.every):
        why = "; ".join(found.damaged) or "checkpoint.every = 0"
        raise CheckpointError(
            f"{lost}. {done} steps are done, and there is no checkpoint to go on from: {why}"
        ) from lost
    return None
