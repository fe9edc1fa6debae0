"""What the pipeline asks of each service. `actors` implements these over Ray, tests with fakes.

A `Handle` stands for a record that the control plane passes on without looking inside: a Ray
object reference in a cluster, the record itself in one process; a `StoredGroup`
(`buffer.group_store`) for a scored group that is on disk.

Every method has a deadline of its own inside the implementation and raises an `RlhfError` that
names what is missing; none waits for ever.
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
    Taken,
    Ticket,
    WeightVersion,
)

if TYPE_CHECKING:
    from pathlib import Path

    from rlhf_cluster.records import BufferState, LearnerState


class GenerationPort(Protocol):
    async def generate(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> Handle:
        """Sample one group. Returns a handle of a `RolloutGroup`.

        A dead or failing worker's group goes to another one; `WorkerError` after the last try.
        """
        ...

    async def pull(self, version: WeightVersion) -> None:
        """Bring every worker to `version`. Returns when it is live on all of them.

        `WeightError` when no worker could read it: all serve on with the weights they had.
        """
        ...


class ScoringPort(Protocol):
    async def score(self, group: Handle) -> tuple[Handle, GroupSummary]:
        """Score a group of rollouts. Returns a handle of an `ExperienceGroup` and its summary.

        `ScoringError` when a reward failed on its last try, `WorkerError` when no worker answered.
        """
        ...


class BufferPort(Protocol):
    async def admit(self) -> list[Ticket]:
        """Wait for free slots; all there are. Empty when the run needs no further group, or was
        stopped."""
        ...

    async def finish(self, ticket: Ticket, handle: Handle, summary: GroupSummary) -> None: ...

    async def discard(self, ticket: Ticket, reason: str) -> None: ...

    async def take(self, num_groups: int, learner_version: int) -> Sequence[Taken]:
        """The next groups, the oldest first, within the look-ahead window of admission order; after
        them those that are replayed.

        None at all once the buffer was asked to `stop`.
        """
        ...

    async def stop(self) -> None:
        """Hand out nothing any more, neither tickets nor groups; what is there stays."""
        ...

    async def state(self, learner_version: int) -> BufferState:
        """What a resumed run needs, after `learner_version` steps and before the next."""
        ...

    async def set_pipeline_depth(self, depth: int) -> None:
        """How many steps generation may run ahead of the learner, from now on."""
        ...

    async def version_live(self, version: int) -> None:
        """Every generation worker now samples with `version` or a later one."""
        ...

    async def forget(self, numbers: Sequence[int]) -> None:
        """The trained groups of these ticket numbers are replayed no more."""
        ...


class RecoveryPort(Protocol):
    """Finished groups on disk. The methods block on the file system and are called in a thread."""

    @property
    def attempt(self) -> int:
        """The number of this start, or return to a checkpoint, of the run."""
        ...

    def recover(self, ticket: Ticket, prompt: Prompt) -> tuple[Handle, GroupSummary] | None:
        """The finished group of `ticket`, where an earlier attempt left one that can be used."""
        ...

    def unusable(self, numbers: Sequence[int]) -> list[int]:
        """Those of these trained groups that cannot be trained again: gone, damaged, or of other
        settings."""
        ...

    def trained(self, step: int, numbers: Sequence[int]) -> None:
        """The groups of these ticket numbers were trained at `step`. Raises `StoreError`."""
        ...


class LearnerPort(Protocol):
    async def train_step(self, groups: Sequence[Taken]) -> StepReport: ...

    async def snapshot(self) -> int:
        """Copy the weights out of the learner, between two steps. Returns their version."""
        ...

    async def publish(self) -> WeightVersion:
        """Write the last snapshot to the weight store, beside the steps that follow."""
        ...

    async def refused(self, version: int, reason: str) -> None:
        """No reader could take `version`: the next one must not build on it."""
        ...

    async def copy_state(self) -> LearnerState:
        """Copy weights, moments and counters out of the learner, between two steps."""
        ...

    async def write_state(self, folder: Path) -> None:
        """Write the last copy into `folder`, beside the steps that follow."""
        ...
