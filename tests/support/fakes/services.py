"""Fakes of the services, and builders of records, for tests of the deciding half."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlhf_cluster.errors import RlhfError
from rlhf_cluster.observe.metric_table import (
    Kind,
    Metric,
)
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    GroupSummary,
    Handle,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    ScoredRollout,
    StepReport,
    Ticket,
    TrainingGroup,
    WeightVersion,
)


def make_prompt(number: int = 0) -> Prompt:
    ids = np.array([1, 2, 3 + number % 7], dtype=np.int32)
    return Prompt(prompt_id=f"p{number}", token_ids=ids, source=f"prompt {number}")


def make_rollout(
    ticket: Ticket, prompt: Prompt, index: int = 0, version: int = 0, num_tokens: int = 4
) -> Rollout:
    return Rollout(
        rollout_id=f"{ticket.group_id}/{index}",
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        response_ids=np.arange(5, 5 + num_tokens, dtype=np.int32),
        sampled_logprobs=np.full(num_tokens, -0.5, dtype=np.float32),
        versions=np.full(num_tokens, version, dtype=np.int32),
        response_mask=np.ones(num_tokens, dtype=bool),
        finish_reason=FinishReason.STOP,
        temperature=1.0,
        worker="fake-0",
        started_s=0.0,
        finished_s=1.0,
    )


def make_group(
    ticket: Ticket, prompt: Prompt, rewards: Sequence[float], version: int = 0
) -> ExperienceGroup:
    scored = tuple(
        ScoredRollout(
            rollout=make_rollout(ticket, prompt, i, version, num_tokens=3 + i % 3),
            reward=reward,
            reward_parts={"exact_match": reward},
            ref_logprobs=None,
            scorer="fake",
        )
        for i, reward in enumerate(rewards)
    )
    return ExperienceGroup(ticket=ticket, prompt=prompt, scored=scored)


def finished_group(ticket: Ticket, group: ExperienceGroup) -> TrainingGroup:
    return TrainingGroup(ticket=ticket, handle=group, summary=group.summary())


def make_version(number: int) -> WeightVersion:
    return WeightVersion(
        version=number, path=f"/weights/v{number}", digest=f"d{number}", num_tensors=2, num_bytes=8
    )


@dataclass
class FakeGeneration:
    """Samples with the version it last pulled. `delay` decides how long each group takes."""

    delay: Callable[[Ticket], float] = lambda ticket: 0.0
    fail: Callable[[Ticket], RlhfError | None] = lambda ticket: None
    pull_delay_s: float = 0.0
    version: int = -1
    pulled: list[int] = field(default_factory=list)
    requested: list[Ticket] = field(default_factory=list)

    async def generate(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> Handle:
        self.requested.append(ticket)
        version = self.version
        await asyncio.sleep(self.delay(ticket))
        error = self.fail(ticket)
        if error is not None:
            raise error
        rollouts = tuple(
            make_rollout(ticket, prompt, i, version) for i in range(sampling.num_samples)
        )
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=rollouts)

    async def pull(self, version: WeightVersion) -> None:
        await asyncio.sleep(self.pull_delay_s)
        self.version = version.version
        self.pulled.append(version.version)


@dataclass
class FakeScoring:
    fail: Callable[[RolloutGroup], RlhfError | None] = lambda group: None
    rewards: Callable[[RolloutGroup], Sequence[float]] = lambda group: [1.0] * len(group.rollouts)

    async def score(self, group: RolloutGroup) -> tuple[Handle, GroupSummary]:
        error = self.fail(group)
        if error is not None:
            raise error
        scored = tuple(
            ScoredRollout(rollout=r, reward=v, reward_parts={}, ref_logprobs=None, scorer="fake")
            for r, v in zip(group.rollouts, self.rewards(group), strict=True)
        )
        experience = ExperienceGroup(ticket=group.ticket, prompt=group.prompt, scored=scored)
        return experience, experience.summary()


@dataclass
class FakeLearner:
    """Counts steps. `trained` keeps the staleness of every group it was given."""

    step_delay_s: float = 0.0
    publish_delay_s: float = 0.0
    version: int = 0
    snapshot_version: int = -1
    trained: list[tuple[int, str, int]] = field(default_factory=list)
    publishing: int = 0
    fail_at: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    refusals: list[tuple[int, str]] = field(default_factory=list)

    async def train_step(self, groups: Sequence[TrainingGroup]) -> StepReport:
        if self.version == self.fail_at:
            raise RlhfError("the learner broke")
        await asyncio.sleep(self.step_delay_s)
        for group in groups:
            staleness = self.version - group.summary.oldest_version
            self.trained.append((self.version, group.ticket.group_id, staleness))
        self.version += 1
        return StepReport(step=self.version, metrics=dict(self.metrics))

    async def snapshot(self) -> int:
        self.snapshot_version = self.version
        return self.version

    async def publish(self) -> WeightVersion:
        self.publishing += 1
        assert self.publishing == 1, "two publishes at once"
        version = self.snapshot_version
        await asyncio.sleep(self.publish_delay_s)
        self.publishing -= 1
        return make_version(version)

    async def refused(self, version: int, reason: str) -> None:
        self.refusals.append((version, reason))


@dataclass
class FakePrompts:
    drawn: int = 0

    def seek(self, cursor: int) -> None:
        self.drawn = cursor

    def next(self) -> Prompt:
        self.drawn += 1
        return make_prompt(self.drawn - 1)


@dataclass
class FakeObserver:
    steps: list[StepReport] = field(default_factory=list)
    discarded: list[tuple[str, str]] = field(default_factory=list)
    recovered: list[int] = field(default_factory=list)
    events: list[str] = field(default_factory=list)

    def step(self, report: StepReport, taken: Sequence[TrainingGroup], times: object) -> None:
        self.steps.append(report)

    def group_discarded(self, ticket: Ticket, error: RlhfError) -> None:
        self.discarded.append((ticket.group_id, str(error)))

    def group_recovered(self, ticket: Ticket) -> None:
        self.recovered.append(ticket.number)

    def event(self, text: str) -> None:
        self.events.append(text)


class Sent:
    """A sender of metrics. `series` by name and label value: of a gauge the last value, of a counter
    the sum."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, ...], float] = {}

    def send(self, metric: Metric, value: float, labels: Mapping[str, str]) -> None:
        key = (metric.name, *labels.values())
        before = self.series.get(key, 0.0) if metric.kind is Kind.COUNTER else 0.0
        self.series[key] = before + value
