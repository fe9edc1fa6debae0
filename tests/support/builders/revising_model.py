"""A model that criticises and revises, its scores, and what makes data of them, without a pool."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_cluster.config.dataset_config import Revise
from rlhf_cluster.errors import (
    RlhfError,
)
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    GroupSummary,
    Prompt,
    RolloutGroup,
    Sampling,
    ScoredRollout,
    Ticket,
)
from rlhf_cluster.synthetic_data.answers_file import (
    Answers,
    AnswersFile,
    in_order,
)
from rlhf_cluster.synthetic_data.produce import (
    Producer,
    Revisions,
)
from rlhf_cluster.util.slow_disk import DiskDeadline
from tests.support.fakes.services import (
    FakePrompts,
    make_rollout,
)

PRINCIPLES = ("be kind", "be brief", "be honest")
SAMPLES, PROMPTS = 2, 6


def text_of(ids: Sequence[int]) -> str:
    return "".join(map(chr, ids))


def ids_of(text: str) -> np.ndarray:
    return np.array([ord(c) for c in text], dtype=np.int32)


def how(**changes: Any) -> Revise:
    return Revise.model_validate(
        {
            "principles": PRINCIPLES,
            "rounds": 2,
            "critique_request": "C|{prompt}|{response}|{principle}",
            "revision_request": "R|{response}|{critique}",
            **changes,
        }
    )


@dataclass
class Model:
    """Answers, criticises ("of" what it was asked) and revises (adds a "+"). `odd` may give another
    text, and whether it is cut, to a request; `fail` an error to a ticket."""

    odd: Callable[[int, str], tuple[str, bool] | None] = lambda number, request: None
    fail: Callable[[Ticket, Prompt], RlhfError | None] = lambda ticket, prompt: None
    asked: list[tuple[int, str]] = field(default_factory=list)

    async def generate(
        self, ticket: Ticket, prompt: Prompt, sampling: Sampling, start: Any = None
    ) -> RolloutGroup:
        request = str(prompt.source)
        self.asked.append((ticket.number, request))
        if (error := self.fail(ticket, prompt)) is not None:
            raise error
        await asyncio.sleep(0)
        rollouts = []
        for index in range(sampling.num_samples):
            text, cut = self.odd(ticket.number, request) or (self._text(request, index), False)
            ids = ids_of(text)
            rollouts.append(
                replace(
                    make_rollout(ticket, prompt, index),
                    response_ids=ids,
                    sampled_logprobs=np.full(len(ids), -0.5, dtype=np.float32),
                    versions=np.full(len(ids), -1, dtype=np.int32),
                    response_mask=np.ones(len(ids), dtype=bool),
                    finish_reason=FinishReason.LENGTH if cut else FinishReason.STOP,
                )
            )
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=tuple(rollouts))

    def _text(self, request: str, index: int) -> str:
        kind, *parts = request.split("|")
        if kind == "C":
            return f"({parts[2]} of {parts[1]})"
        return f"{parts[0]}+" if kind == "R" else f"{request}/{index}"


@dataclass
class Scoring:
    """The reward is the number of "+"."""

    groups: list[RolloutGroup] = field(default_factory=list)

    async def score(self, group: RolloutGroup) -> tuple[ExperienceGroup, GroupSummary]:
        self.groups.append(group)
        scored = tuple(
            ScoredRollout(
                rollout=rollout,
                reward=float(text_of(rollout.response_ids).count("+")),
                reward_parts={"plus": 1.0},
                ref_logprobs=None,
                scorer="fake",
                scorer_version="v1",
            )
            for rollout in group.rollouts
        )
        found = ExperienceGroup(ticket=group.ticket, prompt=group.prompt, scored=scored)
        return found, found.summary()


def producer(
    folder: Path, model: Model | None = None, section: Revise | None = None, **changes: Any
) -> Producer:
    async def fetch(handle: Any) -> Any:
        return handle

    own = {name: changes.pop(name) for name in ("asker", "encode", "max_prompt_tokens", "seed")
           if name in changes}  # fmt: skip
    revisions: dict[str, Any] = {
        "how": section or how(),
        "asker": None,
        "render": ids_of,
        "encode": lambda text: ids_of(text).tolist(),
        "max_prompt_tokens": 200,
        "seed": 0,
    }
    settings: dict[str, Any] = {
        "generation": model or Model(),
        "scoring": Scoring(),
        "fetch": fetch,
        "decode": text_of,
        "prompts": FakePrompts(),
        "num_prompts": PROMPTS,
        "sampling": Sampling(num_samples=SAMPLES, temperature=1.0, max_tokens=16),
        "completions": None,
        "revisions": Revisions(**revisions | own),
        "file": AnswersFile(folder / "groups.jsonl"),
        "patience": DiskDeadline(limit_s=60.0, setting="a.timeout_s"),
        "max_in_flight": 3,
        "max_error_rate": 1.0,
        "finished": lambda answers: None,
        "discarded": lambda number, error: None,
    }
    return Producer(**settings | changes)


def run(work: Producer) -> list[Answers]:
    asyncio.run(work.run())
    work.file.close()
    return list(in_order(work.file.path))
