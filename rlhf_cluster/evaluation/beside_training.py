"""Evaluations that run on the generation pool beside training.

    version v is live -> sets that are due are measured -> a point at step v, however late
         |                                                        | not finished after `hold_s`
         v                                                        v
    version w is written -> the workers wait -> they take w    a skip at step v, with its reason

Promises:
- the learner waits for none of this: only the workers keep version v, for at most `hold_s` seconds
  after version w could be taken. So every token of a point is of version v, and `evaluate` refuses
  an answer of which one is not;
- at most one evaluation runs at a time. One that is due meanwhile is skipped;
- each due evaluation ends as a point or as a skip in the run's record, from which the schedule is
  derived. One that the end of an attempt cuts short is neither, and is due again;
- a failure of an evaluation is the reason of a skip and never ends training.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from rlhf_cluster.errors import RlhfError
from rlhf_cluster.evaluation.evaluate import Evaluation
from rlhf_cluster.evaluation.schedule import due_sets

CANCEL_S = 30.0
"""Most seconds for a cancelled evaluation to end its calls."""


class Record(Protocol):
    """Record of a run, as evaluations read and write it."""

    @property
    def covered(self) -> Mapping[str, int]:
        """Newest version by set that has a point or a skip."""
        ...

    def record_point(self, name: str, version: int, found: Evaluation) -> object: ...

    def record_skip(self, name: str, version: int, reason: str) -> None: ...


@dataclass(slots=True, kw_only=True)
class BesideTraining:
    """Runner of the evaluations during training, which `weights.sync` calls for every version.

    `measure` evaluates one set, by name, on the version that is live. `every` has the steps between
    two evaluations, by set.
    """

    every: Mapping[str, int]
    last_version: int
    hold_s: float
    measure: Callable[[str, int], Awaitable[Evaluation]]
    record: Record
    _running: asyncio.Task[None] | None = None
    _version: int = -1  # of the running evaluation
    _left: list[str] = field(default_factory=list)  # sets of it without a point or a skip
    _is_closed: bool = False

    def live(self, version: int) -> None:
        """Start the evaluation of `version`, which every worker has, on the sets that are due.

        None starts after `close`: a publish may end later than its attempt. Raises an error of the last
        evaluation that is no `RlhfError`.
        """
        if self._is_closed:
            return
        due = due_sets(self.every, self.record.covered, version, self.last_version)
        if not due:
            return
        if self._is_running:
            self._skip(due, version, f"the evaluation of version {self._version} still runs")
            return
        if self._running is not None:
            self._running.result()
        self._version, self._left = version, due
        self._running = asyncio.create_task(self._measure())

    async def make_way(self, version: int) -> None:
        """Let the running evaluation end before the workers take `version`.

        Waits for: its end, at most `hold_s`; then it is cancelled and its sets are skipped. Raises an
        error of the evaluation that is no `RlhfError`.
        """
        if self._running is None:
            return
        await asyncio.wait({self._running}, timeout=self.hold_s)
        if self._is_closed:
            return
        if self._is_running:
            await self._cancel()
            self._skip(
                self._left,
                self._version,
                f"it had not ended when version {version} was due on the workers, nor within "
                f"evaluation.hold_s = {self.hold_s:g} s of it. Raise hold_s, or lower num_prompts, "
                "samples or max_response_tokens of the set",
            )
        else:
            self._running.result()
        self._running = None

    async def close(self) -> None:
        """End the running evaluation without a record of it, so that a resumed run repeats it.

        No other one starts. Waits for: its calls to be cancelled, at most `CANCEL_S`.
        """
        self._is_closed = True
        if self._is_running:
            await self._cancel()
        self._running = None

    @property
    def _is_running(self) -> bool:
        return self._running is not None and not self._running.done()

    async def _cancel(self) -> None:
        assert self._running is not None
        self._running.cancel()
        await asyncio.wait({self._running}, timeout=CANCEL_S)

    async def _measure(self) -> None:
        """Measure the sets in `_left`, one after the other, on `_version`."""
        while self._left:
            name = self._left[0]
            try:
                found = await self.measure(name, self._version)
            except RlhfError as error:
                self._skip([name], self._version, str(error))
            else:
                self.record.record_point(name, self._version, found)
            self._left = self._left[1:]

    def _skip(self, names: Sequence[str], version: int, reason: str) -> None:
        for name in names:
            self.record.record_skip(name, version, reason)
