"""Actor of a rank, and the client of all ranks, for reinforcement learning and offline stages.

Each rank runs its steps sequentially in one thread. A checkpoint is written in other threads ("io"),
while the next step runs. If a rank dies or hangs, the call to all ranks fails with a `CoreLost` that
names it. If a rank raises an error that another attempt may not see, the call fails with a `RankFailed`
(`rlhf_cluster.failures`). The other ranks, which wait for it in a collective, are then ended too
(`actors.services.learner_core`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import ray

from actors.cluster.calls import core_answer
from rlhf_cluster.errors import WorkerError
from rlhf_cluster.failures import as_rank_failure
from rlhf_cluster.observe.occupancy import resident_bytes
from rlhf_cluster.records import LearnerState
from rlhf_cluster.util.deadlines import callee_deadline
from rlhf_cluster.util.slow_disk import DiskDeadline

log = logging.getLogger(__name__)

IO_GROUP = "io"  # three threads: publishing, its cancelling, a checkpoint
LIFE_GROUP = "life"
ACTOR_OPTIONS = {"concurrency_groups": {IO_GROUP: 3, LIFE_GROUP: 1}}
NO_RANK = -1
"""Rank number of a hot spare, until `enlist`."""

_P = ParamSpec("_P")
_T = TypeVar("_T")


def judging(method: Callable[_P, _T], starting: bool = False) -> Callable[_P, _T]:
    """Wrap `method` so that errors that another attempt may not see become `RankFailed`."""

    @functools.wraps(method)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return method(*args, **kwargs)
        except Exception as error:
            found = as_rank_failure(error, starting)
            if found is error:
                raise
            log.exception("%s failed", method.__name__)
            raise found from error

    return call


class RankActor:
    """Actor of one rank, `self._rank`.

    `setup` of the subclass builds the rank. torch is imported there, so that the process answers before
    the model is loaded.
    """

    def __init__(self, config: Any, model_dir: str, rank: int) -> None:
        self._config = config
        self._model_dir = model_dir
        self._number = rank
        self._rank: Any = None
        self._listener: socket.socket | None = None
        self._store: Any = None
        self._metrics: Any = None

    def warm(self) -> str:
        """Import the modules that `setup` needs. Returns a description of this process."""
        from rlhf_cluster.learner.prewarm import warm

        warm(self._config.learner, self._model_dir)
        return f"process {os.getpid()} on {ray.util.get_node_ip_address()}"

    def enlist(self, config: Any, rank: int) -> None:
        """Make this hot spare rank `rank` of the run of `config`; precedes every other call."""
        self._config, self._number = config, rank

    def rendezvous(self) -> str:
        """Listen on this node, and return the address at which the ranks meet. For rank 0 only."""
        host = ray.util.get_node_ip_address()
        self._listener = socket.create_server((host, 0))
        return f"tcp://{host}:{self._listener.getsockname()[1]}"

    def _open(self) -> None:
        """Open logs and metrics, and on rank 0 the store through which the ranks meet."""
        from actors.cluster.launch import check_code
        from actors.cluster.ray_metrics import RayMetrics
        from rlhf_cluster.observe.record.logs import configure
        from rlhf_cluster.util.process_group import serve_store

        check_code()
        name = f"learner-{self._number}"
        configure("learner", name, self._config.run_dir / "logs")
        self._metrics = RayMetrics("learner", {"run": self._config.run.name, "worker": name})
        if self._listener is not None:
            self._store = serve_store(self._listener)

    @judging
    def copy_state(self) -> LearnerState:
        return self._rank.copy_state()

    @judging
    def write_state(self, root: str, timeout_s: float) -> Any:
        patience = self._patience(timeout_s, "checkpoint.timeout_s")
        return patience.wait(f"a shard in {root}", lambda: self._rank.write_state(root))

    @judging
    def commit_state(self, root: str, version: int, reports: list[Any], timeout_s: float) -> None:
        from rlhf_cluster.weights.store import commit

        commit(root, version, reports, keep=1, fsync=True, lock_timeout_s=timeout_s)
        log.info("state of version %d written to %s", version, root)

    @judging
    def load_state(self, folder: str, state: LearnerState) -> None:
        self._rank.load_state(folder, state)
        log.info("resumes from %s", folder)

    @ray.method(concurrency_group=LIFE_GROUP)
    def present(self, after_s: float) -> None:
        """Return after `after_s` seconds, which shows that the process is alive.

        It has its own thread, so other calls do not delay it.
        """
        if self._metrics is not None:
            self._metrics.gauge("learner/resident_bytes", resident_bytes())
        time.sleep(after_s)

    def _patience(self, timeout_s: float, setting: str) -> DiskDeadline:
        """Build the deadline of a disk write, which ends before the driver's call times out."""
        fraction = self._config.observe.slow_write_fraction
        return DiskDeadline(
            limit_s=timeout_s, setting=setting, told_fraction=fraction, tell=log.warning
        )

    def close(self) -> None:
        if self._rank is not None:
            self._rank.close()


class RayRanks:
    """Client that calls all ranks."""

    def __init__(self, actors: Sequence[Any], config: Any) -> None:
        self._actors = list(actors)
        self._config = config

    async def setup(self) -> list[dict[str, Any]]:
        timeout_s = self._config.run.start_timeout_s
        asked = self._actors[0].rendezvous.remote()
        where = await core_answer(asked, timeout_s, "learner-0.rendezvous")
        return await self._all("setup", timeout_s, where)

    async def copy_state(self) -> LearnerState:
        states = await self._all("copy_state", self._config.learner.step_timeout_s)
        if len({state.version for state in states}) != 1:
            raise WorkerError(f"learner ranks are at different versions: {states}; expected one")
        return replace(states[0], num_bytes=sum(state.num_bytes for state in states))

    async def write_state(self, folder: Path) -> None:
        """Write the state of all ranks into `folder`, then commit it.

        Waits for: every rank's write, then the commit, both within one deadline, which is shorter than
        `checkpoint.timeout_s`.
        """
        ends = time.monotonic() + callee_deadline(self._config.checkpoint.timeout_s)
        reports = await self._io("write_state", self._actors, ends, str(folder))
        version = reports[0].version
        await self._io("commit_state", self._actors[:1], ends, str(folder), version, reports)

    async def load_state(self, folder: Path, state: LearnerState) -> None:
        """Load `state` from `folder` on every rank.

        Waits for: every rank to read the complete state.
        """
        await self._all("load_state", self._config.run.start_timeout_s, str(folder), state)

    async def _io(self, method: str, actors: Sequence[Any], ends: float, *arguments: Any) -> Any:
        """Call `method` of `actors` in their "io" threads, and return the answers.

        The seconds that are left until `ends` are the last argument of each call.
        """
        left_s = max(0.0, ends - time.monotonic())
        refs = [
            getattr(a, method).options(concurrency_group=IO_GROUP).remote(*arguments, left_s)
            for a in actors
        ]
        return await self._answers(refs, left_s, method)

    async def _all(self, method: str, timeout_s: float, *arguments: Any) -> list[Any]:
        refs = [getattr(actor, method).remote(*arguments) for actor in self._actors]
        return await self._answers(refs, timeout_s, method)

    async def _answers(self, refs: Sequence[Any], timeout_s: float, method: str) -> list[Any]:
        """Return the answers of all ranks, or raise the error of the first rank to fail.

        Waits for: every rank.
        """
        waits = [
            asyncio.ensure_future(core_answer(ref, timeout_s, f"learner-{i}.{method}"))
            for i, ref in enumerate(refs)
        ]
        try:
            return await asyncio.gather(*waits)
        finally:
            for wait in waits:
                wait.cancel()
