"""Interfaces of the services that the pipeline calls.

`actors` implements them over Ray, tests with fakes.

A `Handle` stands for a record that the control plane passes on without reading it: a Ray object
reference in a cluster, the record itself in one process, a `StoredGroup` (`buffer.group_store`) for
a scored group on disk. Every method has its own deadline in the implementation, and raises an
`RlhfError` that names what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rlhf_cluster.records import (
    GroupSummary,
    Handle,
    Prompt,
    Sampling,
    StepReport,
    Ticket,
    TrainingGroup,
    WeightVersion,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf_cluster.records import BufferState, LearnerState


class GenerationPort(Protocol):
    """Pool of generation workers."""

    async def generate(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> Handle:
        """Sample one group; return a handle of a `RolloutGroup`.

        If a worker fails, another one retries the group. Raises `WorkerError` after the last try.
        """
        ...

    async def pull(self, version: WeightVersion) -> None:
        """Load `version` on every worker; return when it is live on all of them.

        Raises `WeightError` if no worker could read it: all keep serving the weights they had.
        """
        ...


class ScoringPort(Protocol):
    """Pools of scoring workers."""

    async def score(self, group: Handle) -> tuple[Handle, GroupSummary]:
        """Score the rollouts of one group; return a handle of an `ExperienceGroup` and its summary.

        Raises `ScoringError` if a reward failed on its last try, `WorkerError` if no worker answered.
        """
        ...


class BufferPort(Protocol):
    """Buffer of groups between generation and learner, which enforces the staleness bound."""

    async def admit(self) -> Sequence[Ticket] | None:
        """Wait for free slots; return their tickets. Empty after the run's last group, or `stop`.

        None means that none was free for a while: call again.
        """
        ...

    async def finish(self, group: TrainingGroup) -> None:
        """Store a scored group for training."""
        ...

    async def discard(self, ticket: Ticket, reason: str) -> None:
        """Withdraw `ticket`, counted by `reason`; another group is admitted instead."""
        ...

    async def take(self, num_groups: int, learner_version: int) -> Sequence[TrainingGroup] | None:
        """Wait for the oldest `num_groups` within the look-ahead window of admission order.

        Returns them, followed by replayed groups. Empty after `stop`. None means that they are not
        finished yet: call again.
        """
        ...

    async def stop(self) -> None:
        """Return neither tickets nor groups from here on; keep the groups that are stored."""
        ...

    async def state(self, learner_version: int) -> BufferState:
        """Return the state for a resumed run, after `learner_version` steps and before the next."""
        ...

    async def set_pipeline_depth(self, depth: int) -> None:
        """Set the number of steps that generation may run ahead of the learner."""
        ...

    async def set_live_version(self, version: int) -> None:
        """Record that every generation worker samples with `version` or a later one."""
        ...

    async def exclude_from_replay(self, numbers: Sequence[int]) -> None:
        """Exclude the trained groups of these ticket numbers from replay."""
        ...


class RecoveryPort(Protocol):
    """Finished groups on disk. The methods block on the file system, so callers use a thread."""

    @property
    def attempt(self) -> int:
        """Number of starts of the run, and of returns to a checkpoint, so far."""
        ...

    def recover(self, ticket: Ticket, prompt: Prompt) -> tuple[Handle, GroupSummary] | None:
        """Return the finished group of `ticket` if an earlier attempt stored a usable one."""
        ...

    def find_unusable(self, numbers: Sequence[int]) -> list[int]:
        """Return those of these trained groups that are missing, damaged, or of other settings."""
        ...

    def record_trained(self, step: int, numbers: Sequence[int]) -> None:
        """Record that these ticket numbers were trained at `step`. Raises `StoreError`."""
        ...


class LearnerPort(Protocol):
    """All ranks of the learner."""

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        """Train one step on `groups`."""
        ...

    async def snapshot(self) -> int:
        """Copy the weights out of the learner, between two steps; return their version."""
        ...

    async def publish(self) -> WeightVersion:
        """Write the last snapshot to the weight store, concurrently with the following steps."""
        ...

    async def refused(self, version: int, reason: str) -> None:
        """Record that no worker could load `version`: the next version must not build on it."""
        ...

    async def copy_state(self) -> LearnerState:
        """Copy weights, moments and counters out of the learner, between two steps."""
        ...

    async def write_state(self, folder: Path) -> None:
        """Write the last copy into `folder`, concurrently with the following steps."""
        ...
