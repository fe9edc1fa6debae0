"""Writing of checkpoints in the background, overlapped with the following steps.

    step k done -> copy of the learner's state, snapshot of the run   (the learner waits for these)
                     -> ranks write -> run.json -> marker -> older ones removed   (during step k+1)

Promises:
- a checkpoint is one consistent snapshot, of the moment between step k and step k + 1;
- at most one is written at a time. One that is due meanwhile is skipped and counted, unless it is
  that of the last step;
- an abandoned checkpoint never appears later: neither after its deadline nor after the run returned
  to an earlier one (`fence`);
- a checkpoint that cannot be written, or not within `timeout_s`, does not end the run. It is logged
  and counted, and the last complete one stays. Only `save_now` raises;
- a checkpoint that is slow is logged before its deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_cluster.errors import RlhfError, StalledError
from rlhf_cluster.ports import LearnerPort
from rlhf_cluster.records import LearnerState
from rlhf_cluster.run.checkpoint import checkpoint_folder
from rlhf_cluster.run.checkpoint.remote_copies import Copies
from rlhf_cluster.run.checkpoint.run_state import RunState
from rlhf_cluster.util.slow_disk import (
    DiskDeadline,
    run_in_thread,
)

SETTING = "checkpoint.timeout_s"
Cut = Callable[[int, LearnerState], Awaitable[RunState]]
"""Function that returns the state of the run after a step, from that of the learner."""


@dataclass(slots=True, kw_only=True)
class CheckpointStats:
    """Counters of the checkpoints. Seconds and bytes are those of the last one.

    `last` is the step of the last complete checkpoint, -1 before the first.
    """

    last: int = -1
    skipped: int = 0
    failed: int = 0
    wait_s: float = 0.0  # the learner waited for the copy
    write_s: float = 0.0
    num_bytes: int = 0


async def _ignore_states(states: Sequence[RunState]) -> None:
    return None


@dataclass(slots=True, kw_only=True)
class Checkpoints:
    """Writer of checkpoints, one at a time. With `every` 0 only `save_now` writes one.

    `kept` is called with the states that stay on disk. `timeout_s` is the deadline of writing one. A
    checkpoint that takes more than the share `told_fraction` of it is logged as slow.
    """

    root: Path
    every: int
    keep: int
    num_steps: int
    learner: LearnerPort
    cut: Cut
    tell: Callable[[str], None]
    clock: Callable[[], float]
    timeout_s: float
    keep_best: int = 0
    told_fraction: float = 0.25
    kept: Callable[[Sequence[RunState]], Awaitable[None]] = _ignore_states
    check_owner: Callable[[], None] = lambda: (
        None
    )  # raises if another process owns the run's folder
    fence: checkpoint_folder.Fence = nullcontext  # of the attempt that writes
    copies: Copies | None = None
    stats: CheckpointStats = field(default_factory=CheckpointStats)
    _running: asyncio.Task[None] | None = None

    async def after_step(self, step: int) -> None:
        """Begin the checkpoint of `step` if one is due. Call between steps.

        Waits for: the copy and the snapshot, if one is due. After the last step, whose checkpoint is
        never skipped, it also waits for one in progress.
        """
        if not self.every or (step % self.every and step != self.num_steps):
            return
        if self._running is not None:
            if not self._running.done() and step != self.num_steps:
                self.stats.skipped += 1
                return
            await self._running
        try:
            state = await self._copy(step)
        except RlhfError as error:
            self._count_failure(step, error)
            return
        self._running = asyncio.create_task(self._write_or_tell(state))

    async def save_now(self, step: int, timeout_s: float) -> None:
        """Ensure that `step`, the learner's current step, has a complete checkpoint.

        Waits for: one in progress, then its own. Raises the error that ends it, and `StalledError`
        after `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self.drain()
                if self.stats.last != step:
                    await self._write(await self._copy(step))
        except TimeoutError:
            raise StalledError(
                f"the checkpoint of step {step} was not complete after {timeout_s:g} s; the last "
                f"complete one is {self.describe_last()}"
            ) from None

    async def drain(self) -> None:
        """Wait for the checkpoint in progress.

        Unblocked by: its end, the learner's deadline.
        """
        if self._running is not None:
            await self._running

    async def copied(self) -> None:
        """Wait for copies that are in progress or due.

        Unblocked by: their ends, their deadlines. Raises nothing: a failed copy is logged and counted.
        """
        if self.copies is not None:
            await self.copies.drain()

    def close(self) -> None:
        """Stop copying. A copy in progress ends soon after, incomplete."""
        if self.copies is not None:
            self.copies.close()

    def describe_last(self) -> str:
        return f"that of step {self.stats.last}" if self.stats.last >= 0 else "none"

    async def _copy(self, step: int) -> RunState:
        start = self.clock()
        state = await self.cut(step, await self.learner.copy_state())
        self.stats.wait_s = self.clock() - start
        return state

    async def _write_or_tell(self, state: RunState) -> None:
        try:
            await self._write(state)
        except RlhfError as error:
            self._count_failure(state.step, error)

    async def _write(self, state: RunState) -> None:
        start, num_bytes = self.clock(), state.learner.num_bytes
        patience = DiskDeadline(
            limit_s=self.timeout_s,
            setting=SETTING,
            told_fraction=self.told_fraction,
            tell=self.tell,
        )
        what = f"the checkpoint of step {state.step} in {self.root}, {num_bytes} bytes,"
        try:
            async with asyncio.timeout(self.timeout_s), patience.telling(what):
                # first: another run's partial checkpoint may be there, which `begin` would delete
                await run_in_thread(self.check_owner)
                partial = await run_in_thread(
                    checkpoint_folder.begin, self.root, state.step, num_bytes
                )
                await self.learner.write_state(partial / checkpoint_folder.LEARNER)
                await run_in_thread(self.check_owner)
                await run_in_thread(checkpoint_folder.complete, partial, state, self.fence)
                self.stats.last, self.stats.num_bytes = state.step, num_bytes
                states = await run_in_thread(
                    checkpoint_folder.retain, self.root, self.keep, self.keep_best
                )
                await self.kept(states)
                if self.copies is not None:
                    self.copies.follow(state.step for state in states)
        except TimeoutError:
            raise StalledError(
                f"{patience.over(what)}. Give run.root a faster disk, or raise {SETTING}"
            ) from None
        self.stats.write_s = self.clock() - start

    def _count_failure(self, step: int, error: RlhfError) -> None:
        self.stats.failed += 1
        self.tell(f"no checkpoint of step {step}; the last is {self.describe_last()}: {error}")
