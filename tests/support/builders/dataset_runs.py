"""A stage that samples answers, with a pool and rewards that are scripted."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster.config.dataset_config import GenerateSection
from rlhf_cluster.errors import (
    RlhfError,
    WorkerError,
)
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    PartialGroup,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    ScoredRollout,
    Ticket,
)
from rlhf_cluster.synthetic_data.answers_file import (
    Answer,
    Answers,
    AnswersFile,
    in_order,
)
from rlhf_cluster.synthetic_data.produce import Producer
from rlhf_cluster.util.slow_disk import DiskDeadline
from tests.support.fakes.services import (
    FakePrompts,
    make_rollout,
)

LINE = 1
SAMPLING = Sampling(num_samples=3, temperature=1.0, max_tokens=16)


def text_of(ids: Sequence[int]) -> str:
    return "".join("\n" if i == LINE else chr(ord("a") + i) for i in ids)


def respond(rollout: Rollout, ids: Sequence[int]) -> Rollout:
    return replace(
        rollout,
        response_ids=np.array(ids, dtype=np.int32),
        sampled_logprobs=np.full(len(ids), -0.5, dtype=np.float32),
        versions=np.full(len(ids), -1, dtype=np.int32),
        response_mask=np.ones(len(ids), dtype=bool),
    )


@dataclass
class Generation:
    """Random tokens of the group's own stream; a response goes on with what it was given."""

    fail: Callable[[Ticket], RlhfError | None] = lambda ticket: None
    asked: list[tuple[int, PartialGroup | None]] = field(default_factory=list)
    under_way: int = 0
    most: int = 0

    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        start: PartialGroup | None = None,
    ) -> RolloutGroup:
        self.asked.append((ticket.number, start))
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        rng = random.Random(ticket.number)
        for _ in range(rng.randrange(4)):
            await asyncio.sleep(0)
        self.under_way -= 1
        if (error := self.fail(ticket)) is not None:
            raise error
        rollouts = []
        for index in range(sampling.num_samples):
            before = [] if start is None else start.responses[index].response_ids.tolist()
            ids = before + [rng.randrange(2, 8) for _ in range(3)]
            if start is None:
                ids += [LINE, 7, LINE, rng.randrange(2, 8)]
            rollouts.append(respond(make_rollout(ticket, prompt, index), ids))
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))


@dataclass
class Scoring:
    """The reward is 1 for an even last token. `fail` may raise instead."""

    fail: Callable[[RolloutGroup], RlhfError | None] = lambda group: None

    async def score(self, group: RolloutGroup) -> tuple[ExperienceGroup, GroupSummary]:
        if (error := self.fail(group)) is not None:
            raise error
        scored = tuple(
            ScoredRollout(
                rollout=rollout,
                reward=float(rollout.response_ids[-1] % 2 == 0),
                reward_parts={"even": 1.0},
                ref_logprobs=None,
                scorer="fake",
                watched={"nothing": float("nan")},
            )
            for rollout in group.rollouts
        )
        found = ExperienceGroup(ticket=group.ticket, prompt=group.prompt, scored=scored)
        return found, found.summary()


def producer(folder: Path, num_prompts: int = 10, **changes: Any) -> Producer:
    async def fetch(handle: Any) -> ExperienceGroup:
        return handle

    settings: dict[str, Any] = {
        "generation": Generation(),
        "scoring": Scoring(),
        "fetch": fetch,
        "decode": text_of,
        "prompts": FakePrompts(),
        "num_prompts": num_prompts,
        "sampling": SAMPLING,
        "completions": None,
        "revisions": None,
        "file": AnswersFile(folder / "groups.jsonl"),
        "patience": DiskDeadline(limit_s=60.0, setting="a.timeout_s"),
        "max_in_flight": 3,
        "max_error_rate": 0.5,
        "finished": lambda answers: None,
        "discarded": lambda number, error: None,
    }
    return Producer(**settings | changes)


def run(work: Producer) -> list[Answers]:
    asyncio.run(work.run())
    work.file.close()
    return list(in_order(work.file.path))


def only(*numbers: int) -> Callable[[Ticket], RlhfError | None]:
    return lambda ticket: WorkerError("broken") if ticket.number in numbers else None


def answers(*rewards: float, texts: Sequence[str] | None = None, **changes: Any) -> Answers:
    texts = texts or [f"answer {i}" for i in range(len(rewards))]
    return Answers(
        number=0,
        prompt_id="p0",
        prompt="why?",
        answers=tuple(
            Answer(text=t, reward=r, parts={}, num_tokens=len(t), cut=False, **changes)
            for t, r in zip(texts, rewards, strict=True)
        ),
    )


def section(select: str, samples: int = 4, **changes: Any) -> GenerateSection:
    return GenerateSection.model_validate({"samples": samples, "select": select, **changes})


def written(folder: Path, groups: Sequence[Answers]) -> Path:
    file = AnswersFile(folder / "groups.jsonl")
    for group in groups:
        file.append(group)
    file.close()
    return file.path
