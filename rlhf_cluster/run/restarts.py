"""Restarts after a learner rank or the buffer fails: budget, pauses, checkpoint.

    attempt --CoreLost--> recover, pause --> attempt, from the newest checkpoint --> ...
            --RoomAgain--> recover --> attempt, with all ranks, from the checkpoint just written
            --any other failure--> the end of the run

Learner ranks and buffer hold one consistent snapshot of the run between them, so all of them
return to a snapshot that was written. Generation and scoring hold nothing of it, and stay up. A
failure of the core is a process that died, or is silent past a deadline, and an error of a live
rank that another attempt may not hit (`failures` has the table).

Promises:
- only a failure of the core is retried; an error that would come back (diverged numbers, refused
  weights, wrong settings) ends the run at once;
- returning to all ranks is not a failure and costs no restart;
- capacity that is missing after a failure costs no restart: the run waits for it, as the pools wait
  for theirs, until it is stopped or `cluster.recovery_timeout_s` has passed; the checkpoint is not read
  again for it;
- failures, those of a start too, are counted within a sliding window of time, so that the budget
  is a rate: a run of weeks loses a process now and then, a crash loop loses many within the
  window. The failure that exceeds `limit` ends the run, with the first of them as its cause;
- nothing that the user asked to keep is deleted: a run without checkpoints, or with damaged ones
  only, is not started from scratch once it has done a step.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass, field
from typing import TypeVar

from rlhf_cluster.config.load import AnyConfig
from rlhf_cluster.errors import CheckpointError, CoreLost, PlacementError, RlhfError
from rlhf_cluster.run.checkpoint import resume
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint
from rlhf_cluster.run.run_directory import RunDir
from rlhf_cluster.run.run_record import read_metrics

log = logging.getLogger(__name__)


@dataclass(slots=True)
class RestartWindow:
    """Restarts within a sliding window of time.

    `total` is their number since the start, `recent` that of the last `window_s` seconds of `clock`.
    """

    window_s: float = 3600.0
    clock: Callable[[], float] = time.monotonic
    total: int = 0
    _counted: deque[tuple[float, RlhfError]] = field(default_factory=deque)  # when, why

    def count(self, cause: RlhfError) -> None:
        """Count one more restart, now."""
        self.total += 1
        self._counted.append((self.clock(), cause))

    @property
    def recent(self) -> int:
        oldest = self.clock() - self.window_s
        while self._counted and self._counted[0][0] <= oldest:
            self._counted.popleft()
        return len(self._counted)

    @property
    def first_cause(self) -> RlhfError | None:
        """Cause of the oldest of the `recent` restarts."""
        return self._counted[0][1] if self.recent else None

    @property
    def until_one_leaves_s(self) -> float:
        """Seconds until the oldest of `recent` leaves the window; 0 without one."""
        if not self.recent:
            return 0.0
        return max(0.0, self._counted[0][0] + self.window_s - self.clock())


@dataclass(slots=True)
class FailedStarts:
    """Starts of workers that failed, by node.

    A node with `limit` of them within `window_s` is avoided until one of them is older than that, or a
    start there succeeds.
    """

    window_s: float = 3600.0
    limit: int = 2
    clock: Callable[[], float] = time.monotonic
    _windows: dict[str, RestartWindow] = field(default_factory=dict)

    def failed(self, node: str, cause: RlhfError) -> bool:
        """Count a failed start, and return whether the node is avoided because of it."""
        window = self._windows.setdefault(node, RestartWindow(self.window_s, self.clock))
        window.count(cause)
        return window.recent == self.limit

    def succeeded(self, node: str) -> None:
        self._windows.pop(node, None)

    def avoided(self, fitting: Callable[[], Collection[str]]) -> dict[str, RlhfError]:
        """Return the nodes to avoid, with their first causes.

        None of them is avoided when no other of the `fitting` nodes is left: then the nodes are not
        what is wrong.
        """
        found: dict[str, RlhfError] = {}
        for node, window in self._windows.items():
            if window.recent >= self.limit and (cause := window.first_cause) is not None:
                found[node] = cause
        return found if found and set(fitting()) - found.keys() else {}


T = TypeVar("T")

MAX_PAUSE_S = 60.0


class RoomAgain(RlhfError):
    """An attempt with too few ranks ended at a checkpoint, since all ranks can be placed."""


@dataclass(slots=True, kw_only=True)
class Restarts:
    """Budget of restarts: at most `limit` within a window.

    The first comes after `pause_s`, each later one there after twice the pause of the one before, at
    most `MAX_PAUSE_S`. `what` is the part that failed and `needs` the resources that it asks for, for
    error messages. `recovery_timeout_s`: longest wait for these resources.
    """

    limit: int
    what: str = "learner or buffer"
    needs: str = ""
    pause_s: float = 1.0
    recovery_timeout_s: float = 3600.0
    window: RestartWindow = field(default_factory=RestartWindow)

    @property
    def used(self) -> int:
        """Number of restarts since the start of the run."""
        return self.window.total

    def spend(self, lost: RlhfError) -> float:
        """Count a restart because of `lost`; return the seconds to wait before it.

        Raises `CoreLost` when the budget is used up.
        """
        recent = self.window.recent
        if recent >= self.limit:
            first = self.window.first_cause or lost
            raise CoreLost(
                f"{self.what} lost {recent + 1} times within {self.window.window_s:g} s, over "
                f"learner.max_restarts = {self.limit}. First cause: {first}. Last: {lost}"
            ) from lost
        self.window.count(lost)
        return self.pause_after(recent)

    def pause_for_room(self, num_before: int, since_s: float, error: PlacementError) -> float:
        """Return the seconds to wait for capacity before a try that `num_before` refusals came before.

        The last try comes at the end of `recovery_timeout_s`.

        Args:
            since_s: time of the first refusal, by the window's clock.
            error: the newest refusal.
        Raises: `PlacementError` when that time has passed.
        """
        waited_s = self.window.clock() - since_s
        left_s = self.recovery_timeout_s - waited_s
        if left_s <= 0:
            raise PlacementError(
                f"the learner cannot be placed after a wait of {waited_s:.0f} s; the limit is "
                f"cluster.recovery_timeout_s = {self.recovery_timeout_s:g}. It needs {self.needs}. "
                f"Last refusal: {error}. Add or free these resources and give the same command "
                "again, which resumes from the last checkpoint; or raise cluster.recovery_timeout_s"
            ) from error
        return min(left_s, self.pause_after(num_before))

    def pause_after(self, num_before: int) -> float:
        """Return the seconds to wait before a try that `num_before` tries came before."""
        return min(MAX_PAUSE_S, self.pause_s * 2.0 ** min(num_before, 30))


async def with_recovery(
    attempt: Callable[[], Awaitable[T]],
    recover: Callable[[RlhfError], Awaitable[None]],
    restarts: Restarts,
    tell: Callable[[str], None] = log.warning,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> T:
    """Call `attempt` until it succeeds, and return its result.

    After a failure `recover` brings everything else to a state to resume from. From the first failure
    on, missing capacity is waited for: dead processes may still hold it, or a node is on its way. Each
    `attempt` waits for it within its own deadline, with a pause between two, up to `MAX_PAUSE_S`.

    Waits for: capacity. Unblocked by: its return, `restarts.recovery_timeout_s`, cancellation.
    """
    num_waits, waits_since_s = 0, 0.0
    while True:
        try:
            return await attempt()
        except RoomAgain as error:
            num_waits = 0  # this attempt was placed: a later wait has all its time
            await recover(error)
            continue
        except PlacementError as error:
            if not restarts.used:
                raise
            if not num_waits:
                waits_since_s = restarts.window.clock()
            pause_s = restarts.pause_for_room(num_waits, waits_since_s, error)
            tell(f"waits for room for the learner: {error}")
            await sleep(pause_s)
            num_waits += 1
            continue
        except CoreLost as error:
            lost = error
        num_waits = 0
        pause_s = restarts.spend(lost)
        await recover(lost)
        await sleep(pause_s)


def find_restart_checkpoint(
    run: RunDir,
    config: AnyConfig,
    lost: RlhfError,
    sleep: Callable[[float], None] = time.sleep,
) -> Checkpoint | None:
    """Return the checkpoint to resume from after `lost`; None means from the beginning.

    It is the newest intact checkpoint of the run, or the copy of a newer one that is damaged. Reads all
    of it. Call while holding `run`.

    Raises `RunError` if another process took `run`. Raises `CheckpointError`, `StorageError` and
    `StalledError` rather than go back further than necessary.
    """
    run.check_claim(sleep)  # before anything is changed: another process may own it
    found = resume.whole_or_copy(run, config, sleep)
    if found.checkpoint is not None:
        return found.checkpoint
    records = read_metrics(run.metrics)
    done = records[-1]["step"] if records else 0
    if found.damaged or (done and not config.checkpoint.every):
        why = "; ".join(found.damaged) or "checkpoint.every = 0"
        raise CheckpointError(
            f"{lost}. {done} steps are done, and there is no checkpoint to resume from: {why}"
        ) from lost
    return None
