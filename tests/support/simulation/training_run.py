"""`resumable_run` with a real learner rank: weights, moments and schedule in a real checkpoint folder.

What is generated follows from the ticket and, with `on_policy`, from the bytes of the weights that
generation pulled last: one bit that a resume changes is in every later sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import xxhash

from rlhf_cluster.learner.learner_rank import LearnerRank
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    Handle,
    LearnerState,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Ticket,
    WeightVersion,
)
from rlhf_cluster.run.checkpoint.checkpoint_folder import Checkpoint
from rlhf_cluster.weights import store
from tests.support.builders.rank_checkpoints import tensors
from tests.support.builders.tiny_learner import VOCABULARY
from tests.support.fakes.services import FakeGeneration
from tests.support.simulation.resumable_run import (
    Attempt,
    LedgerLearner,
)


@dataclass
class TrainingLearner(LedgerLearner):
    """Its checkpoint is that of the rank, and the ledger beside it."""

    rank: LearnerRank | None = None
    digest: str = ""  # of the weights of the last snapshot

    @property
    def real(self) -> LearnerRank:
        assert self.rank is not None
        return self.rank

    def train(self, groups: Sequence[ExperienceGroup]) -> None:
        self.real.train_step(groups)

    async def snapshot(self) -> int:
        self.digest = digest(self.real)
        return await super().snapshot()

    async def publish(self) -> WeightVersion:
        taken = self.digest
        return replace(await super().publish(), digest=taken)

    async def copy_state(self) -> LearnerState:
        await super().copy_state()
        return self.real.copy_state()

    async def write_state(self, folder: Path) -> None:
        report = self.real.write_state(str(folder))
        store.commit(folder, report.version, [report], keep=1)
        await super().write_state(folder)

    def load(self, checkpoint: Checkpoint) -> None:
        super().load(checkpoint)
        self.real.load_state(str(checkpoint.learner), checkpoint.state.learner)
        assert self.real.version == self.version


@dataclass
class TokenGeneration(FakeGeneration):
    """Random tokens; `on_policy`: other ones from other weights."""

    on_policy: bool = False
    digest: str = ""

    async def generate(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> Handle:
        self.requested.append(ticket)
        stream = xxhash.xxh3_64_intdigest(
            f"{ticket.number}/{self.digest * self.on_policy}".encode()
        )
        draw, version = np.random.default_rng(stream), self.version
        rollouts = [
            random_rollout(draw, f"{ticket.group_id}/{i}", prompt, version)
            for i in range(sampling.num_samples)
        ]
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))

    async def pull(self, version: WeightVersion) -> None:
        await super().pull(version)
        self.digest = version.digest


def random_rollout(draw: np.random.Generator, name: str, prompt: Prompt, version: int) -> Rollout:
    count = int(draw.integers(2, 9))
    return Rollout(
        rollout_id=name,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        response_ids=draw.integers(0, VOCABULARY, count).astype(np.int32),
        sampled_logprobs=(-4 + 0.5 * draw.standard_normal(count)).astype(np.float32),
        versions=np.full(count, version, dtype=np.int32),
        response_mask=np.ones(count, dtype=bool),
        finish_reason=FinishReason.STOP,
        temperature=1.0,
        worker="fake-0",
        started_s=0.0,
        finished_s=1.0,
    )


def digest(rank: LearnerRank) -> str:
    """Of the weights, to the bit."""
    hashed = xxhash.xxh3_128()
    for part in rank.model.shards():
        hashed.update(part.tensor.numpy().tobytes())
    return hashed.hexdigest()


@dataclass(kw_only=True)
class TrainingAttempt(Attempt):
    """`start_learner` gives a rank that is set up, the only one of its process."""

    start_learner: Callable[[], LearnerRank]
    on_policy: bool = False
    group_size: int = 2
    learner: TrainingLearner = field(init=False)

    def new_learner(self) -> TrainingLearner:
        return TrainingLearner(store=self.store, rank=self.start_learner())

    def new_generation(self) -> TokenGeneration:
        return TokenGeneration(on_policy=self.on_policy)

    def rewards(self, group: RolloutGroup) -> list[float]:
        """Never equal within a group that is trained on."""
        if self.discarded(group.ticket.number):
            return super().rewards(group)
        return [0.1 + i + float(r.response_ids[0]) for i, r in enumerate(group.rollouts)]

    def trained(self) -> dict[str, np.ndarray]:
        """Weights, moments and counts of optimizer steps, by name."""
        return tensors(self.learner.real)
