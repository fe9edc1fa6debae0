"""Sampling and scoring of prompts by the pools, into the file of answers.

    prompts --number--> GENERATION --rollouts--> SCORING --scored--> answers, one line per prompt
                              ^                     |
                              +-- from each step ---+          with `completions` only
                              +--> critiques and revisions --> SCORING       with `revisions` only

Promises:
- every requested prompt is written, or discarded with a counted reason;
- at most `max_in_flight` groups are sampled or scored at once;
- the samples of a prompt depend on the seed and its index in the stream alone, so that a lost group is
  sampled identically the next time;
- a prompt is written as a whole or not at all.

Without a pool, or when too many groups fail, production ends with the first cause.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np

from rlhf_cluster.config.dataset_config import Revise
from rlhf_cluster.data.reasoning_steps import step_ends, step_spans
from rlhf_cluster.errors import RecordLost, RlhfError
from rlhf_cluster.failures import ErrorRate, is_group_failure
from rlhf_cluster.pipeline import MAX_REGENERATIONS, PromptsPort, generate_and_score
from rlhf_cluster.ports import ScoringPort
from rlhf_cluster.records import (
    ExperienceGroup,
    GroupSummary,
    Handle,
    PartialGroup,
    PartialResponse,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    ScoredRollout,
    Ticket,
)
from rlhf_cluster.synthetic_data.answers_file import Answers, AnswersFile
from rlhf_cluster.synthetic_data.revise_answers import Asker, PoolAsker, Reviser, answer_of
from rlhf_cluster.util.slow_disk import DiskDeadline
from rlhf_cluster.util.waiting import gather_or_cancel

T = TypeVar("T")
FOLDER_VERSION = -1
"""Version of the weights in the model folder, which no run published."""


class ContinuingPort(Protocol):
    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        start: PartialGroup | None = None,
    ) -> Handle:
        """Generate a group as `GenerationPort.generate` does, continuing the responses of `start`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Completions:
    """Settings of completions from the ends of steps. `silent` ids have no text."""

    number: int
    separator: str
    silent: frozenset[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Revisions:
    """Settings of critique and revision, and the functions that they need.

    Without an `asker` the generation pool is asked. `render` returns the token ids of such a request,
    which may have `max_prompt_tokens` at most. `encode` returns the tokens, an end token last, of a
    revision that came as text only.
    """

    how: Revise
    asker: Asker | None
    render: Callable[[str], np.ndarray]
    encode: Callable[[str], Sequence[int]]
    max_prompt_tokens: int
    seed: int


@dataclass(slots=True, kw_only=True)
class Producer:
    """Loop that samples, scores and writes all prompts of a data set.

    `fetch` gets a group from its handle, and `decode` the text of token ids. `finished` or `discarded`
    is called for every prompt that is done. `patience` has the deadline of writes to `file`.
    """

    generation: ContinuingPort
    scoring: ScoringPort
    fetch: Callable[[Handle], Awaitable[Any]]
    decode: Callable[[Sequence[int]], str]
    prompts: PromptsPort
    num_prompts: int
    sampling: Sampling
    completions: Completions | None
    revisions: Revisions | None
    file: AnswersFile
    patience: DiskDeadline
    max_in_flight: int
    max_error_rate: float
    finished: Callable[[Answers], None]
    discarded: Callable[[int, RlhfError], None]
    num_discarded: Counter[str] = field(default_factory=Counter)
    _outcomes: ErrorRate = field(init=False)
    _slots: asyncio.Semaphore = field(init=False)

    @property
    def pending(self) -> list[int]:
        return [number for number in range(self.num_prompts) if number not in self.file.done]

    async def run(self) -> None:
        """Produce all prompts that are not in the file. Waits for all; raises the first failure."""
        self._outcomes = ErrorRate(self.max_error_rate)
        self._slots = asyncio.Semaphore(self.max_in_flight)
        numbers = iter(self.pending)
        await gather_or_cancel(self._work(numbers) for _ in range(self.max_in_flight))

    async def _work(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            try:
                answers = await self._answers(number)
            except RlhfError as error:
                if not is_group_failure(error):
                    raise
                self.num_discarded[type(error).__name__] += 1
                self.discarded(number, error)
                self._outcomes.add(error)
            else:
                await self._keep(answers)
                self.finished(answers)
                self._outcomes.add(None)

    async def _keep(self, answers: Answers) -> None:
        """Write the answers to the file. Waits for the disk, at most the deadline of `patience`."""
        what = f"prompt {answers.number} in {self.file.path}"
        write = asyncio.ensure_future(self.patience.aside(what, self.file.append, answers))
        try:
            await asyncio.shield(write)
        finally:  # where another prompt ends the stage meanwhile, answers that are complete stay
            await asyncio.wait({write}, timeout=self.patience.limit_s)

    async def _answers(self, number: int) -> Answers:
        self.prompts.seek(number)
        prompt = self.prompts.next()
        ticket = Ticket(number=number, version=FOLDER_VERSION)
        if self.revisions is not None:
            first = await self._sample(ticket, prompt, self.sampling)
            return await self._reviser(self.revisions).answers(first)
        group = await self._group(ticket, prompt, self.sampling)
        further: list[tuple[tuple[float, ...], ...] | None] = [None] * len(group.scored)
        if self.completions is not None:
            found = await gather_or_cancel(
                self._step_rewards(number, index, prompt, own, self.completions)
                for index, own in enumerate(group.scored)
            )
            further = [*found]
        return Answers(
            number=number,
            prompt_id=prompt.prompt_id,
            prompt=prompt.source,
            answers=tuple(
                answer_of(own, self.decode, steps)
                for own, steps in zip(group.scored, further, strict=True)
            ),
            scorer_version=group.scored[0].scorer_version,
        )

    async def _group(
        self, ticket: Ticket, prompt: Prompt, sampling: Sampling, start: PartialGroup | None = None
    ) -> ExperienceGroup:
        async def score(rollouts: Handle) -> tuple[ExperienceGroup, GroupSummary]:
            handle, summary = await self.scoring.score(rollouts)
            return await self.fetch(handle), summary

        async with self._slots:
            group, _ = await generate_and_score(
                lambda: self.generation.generate(ticket, prompt, sampling, start), score
            )
        return group

    def _reviser(self, how: Revisions) -> Reviser:
        own = PoolAsker(
            sample=self._sample,
            encode=how.render,
            decode=self.decode,
            sampling=replace(self.sampling, num_samples=1),
            max_prompt_tokens=how.max_prompt_tokens,
            version=FOLDER_VERSION,
        )
        return Reviser(
            how=how.how,
            asker=how.asker or own,
            score=self._score,
            decode=self.decode,
            encode=how.encode,
            seed=how.seed,
            first_stream=self.num_prompts,
            version=FOLDER_VERSION,
        )

    async def _sample(self, ticket: Ticket, prompt: Prompt, sampling: Sampling) -> RolloutGroup:
        """Sample responses to a prompt, without scores."""

        async def rollouts() -> RolloutGroup:
            return await self.fetch(await self.generation.generate(ticket, prompt, sampling))

        async with self._slots:
            return await _unless_lost(rollouts)

    async def _score(self, group: RolloutGroup) -> ExperienceGroup:
        """Score responses that this process holds."""

        async def scores() -> ExperienceGroup:
            handle, _ = await self.scoring.score(group)
            return await self.fetch(handle)

        async with self._slots:
            return await _unless_lost(scores)

    async def _step_rewards(
        self, number: int, index: int, prompt: Prompt, own: ScoredRollout, how: Completions
    ) -> tuple[tuple[float, ...], ...]:
        """Return the rewards of completions from the end of each step of a response.

        For the last step it is the reward of the response itself.
        """
        ids = own.rollout.response_ids.tolist()
        text = self.decode(ids)
        ends = step_ends(self.decode, ids, how.silent, text, step_spans(text, how.separator))
        last = len(ids) - 1
        inner = sorted({int(end) for end in ends if end < last})
        sampling = Sampling(
            num_samples=how.number,
            temperature=self.sampling.temperature,
            max_tokens=self.sampling.max_tokens,
        )
        place = number * self.sampling.num_samples + index

        async def from_step(end: int) -> tuple[float, ...]:
            ticket = Ticket(
                number=self.num_prompts + place * self.sampling.max_tokens + end,
                version=FOLDER_VERSION,
            )
            start = beginning(ticket, own.rollout, end + 1, how.number)
            group = await self._group(ticket, prompt, sampling, start)
            return tuple(float(each.reward) for each in group.scored)

        rewards = dict(zip(inner, await gather_or_cancel(map(from_step, inner)), strict=True))
        rewards[last] = (float(own.reward),)
        return tuple(rewards[int(end)] for end in ends)


def beginning(ticket: Ticket, rollout: Rollout, num_tokens: int, number: int) -> PartialGroup:
    """Return `number` unfinished responses that begin with the first `num_tokens` of `rollout`.

    Each continues with a separate random stream.
    """
    responses = tuple(
        PartialResponse(
            rollout_id=f"{ticket.group_id}/{index}",
            response_ids=rollout.response_ids[:num_tokens],
            sampled_logprobs=rollout.sampled_logprobs[:num_tokens],
            versions=rollout.versions[:num_tokens],
            temperature=rollout.temperature,
        )
        for index in range(number)
    )
    return PartialGroup(group_id=ticket.group_id, responses=responses, started_s=rollout.started_s)


async def _unless_lost(get: Callable[[], Awaitable[T]]) -> T:
    """Return the record of `get`. Call it again, `MAX_REGENERATIONS` times, while the record is
    lost."""
    for _ in range(MAX_REGENERATIONS):
        try:
            return await get()
        except RecordLost:
            continue
    return await get()
