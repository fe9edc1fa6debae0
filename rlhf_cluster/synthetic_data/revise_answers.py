r"""Critique and revision of responses by principles (Bai et al. 2022, arXiv:2212.08073).

    response --principle--> critique --> revision --next principle--> critique --> ...
        \________________ both into one group of the scoring pool _________/

Critiques and revisions come from the model that is sampled, or from a chat endpoint.

Promises:
- the principles of a response depend on the seed, the index of its prompt and its own index alone;
  the text of every critique and revision is kept;
- a reply without text or without an end is not used: it is counted, and requested again in a
  separate random stream. After the last attempt the response is unrevised, with that reason;
- a request above the limit of tokens is not shortened: its response is unrevised too;
- the pool's reply depends on the run's seed and the request's number alone;
- an endpoint has at most `parallel` requests at once, from threads that do not delay the end of
  the process;
- a reply that cannot be obtained raises: none is made up.
"""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np
from xxhash import xxh3_64_intdigest

from rlhf_cluster.config.dataset_config import ChatEndpoint, Revise
from rlhf_cluster.errors import ScoringError
from rlhf_cluster.records import (
    ExperienceGroup,
    FinishReason,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    ScoredRollout,
    Ticket,
)
from rlhf_cluster.rewards.http_client import (
    PATH,
    Server,
    content_of,
    is_cut,
    prompt_text,
    question_of,
)
from rlhf_cluster.rewards.reward_failure import RewardFailure
from rlhf_cluster.synthetic_data.answers_file import Answer, Answers, Revised, Round, Unrevised
from rlhf_cluster.util.waiting import gather_or_cancel

PROBLEMS = {
    "empty_response": "the response has no text",
    "long_critique": "the request for the critique is over data.max_prompt_tokens",
    "empty_critique": "the critique has no text",
    "cut_critique": "the critique reached the limit of tokens",
    "long_revision": "the request for the revision is over data.max_prompt_tokens",
    "empty_revision": "the revision has no text",
    "cut_revision": "the revision reached the limit of tokens",
    "altered_revision": "the tokenizer cannot write the revision",
}

Kind = Literal["critique", "revision"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """Text that answers a request. `rollout` holds its tokens and prompt; None if only text came."""

    text: str
    cut: bool
    rollout: Rollout | None = None


class Asker(Protocol):
    async def ask(self, number: int, request: str) -> Reply | None:
        """Return the reply to `request`, or None where the request is too long.

        `number` determines the random stream. Raises `WorkerError` or `ScoringError` where no reply
        can be obtained.
        """
        ...


@dataclass(slots=True)
class Chain:
    """Rounds and outcome of one response. `problem` is a key of `PROBLEMS`, or "" without one."""

    rounds: list[Round] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    problem: str = ""
    last: Reply | None = None


def drawn(principles: Sequence[str], rounds: int, seed: str) -> list[str]:
    """Draw one principle for each round. All are used before any repeats."""
    rng = np.random.default_rng(xxh3_64_intdigest(seed.encode()))
    found: list[str] = []
    while len(found) < rounds:
        found += [principles[int(place)] for place in rng.permutation(len(principles))]
    return found[:rounds]


async def revise(
    asked: str,
    response: str,
    principles: Sequence[str],
    how: Revise,
    ask: Callable[[int, str], Awaitable[Reply | None]],
) -> Chain:
    """Criticise and revise once by each of `principles`.

    `ask` gets the index of the request, below `requests_of(how)`, and its text.
    """
    chain = Chain()

    async def usable(kind: Kind, step: int, request: str) -> Reply | None:
        for attempt in range(how.attempts):
            reply = await ask(step * how.attempts + attempt, request)
            chain.problem = problem_of(kind, reply)
            if not chain.problem:
                return reply
            if reply is None:  # the same request is as long the next time
                return None
            chain.unusable[chain.problem] += 1
        return None

    for number, principle in enumerate(principles):
        places = {"prompt": asked, "response": response, "principle": principle}
        request = how.critique_request.format(**places)
        critique = await usable("critique", 2 * number, request)
        if critique is None:
            return chain
        request = how.revision_request.format(**places, critique=critique.text)
        revision = await usable("revision", 2 * number + 1, request)
        if revision is None:
            # The critique is kept, so that the user can see which one had no revision.
            chain.rounds.append(Round(principle=principle, critique=critique.text, revision=""))
            return chain
        response, chain.last = revision.text, revision
        chain.rounds.append(
            Round(principle=principle, critique=critique.text, revision=revision.text)
        )
    return chain


def requests_of(how: Revise) -> int:
    """Return the largest number of requests for one response."""
    return 2 * how.rounds * how.attempts


def problem_of(kind: Kind, reply: Reply | None) -> str:
    """Return the key in `PROBLEMS` of a reply that cannot be used, or "" for a usable one."""
    if reply is None:
        return f"long_{kind}"
    if not reply.text.strip():
        return f"empty_{kind}"
    return f"cut_{kind}" if reply.cut else ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reviser:
    """Revises and scores the sampled responses to a prompt.

    `score` returns the group of a first response and its last revision with their rewards, `decode` the
    text of token ids, and `encode` the token ids, an end token last, of a reply that came as text only.
    `first_stream` is the first random stream that no prompt of the data set uses.
    """

    how: Revise
    asker: Asker
    score: Callable[[RolloutGroup], Awaitable[ExperienceGroup]]
    decode: Callable[[Sequence[int]], str]
    encode: Callable[[str], Sequence[int]]
    seed: int
    first_stream: int
    version: int

    async def answers(self, group: RolloutGroup) -> Answers:
        """Revise and score all responses of a group. Waits for all; raises the first failure."""
        done = await gather_or_cancel(
            self._one(group, index) for index in range(len(group.rollouts))
        )
        found = [one for one, _ in done]
        return Answers(
            number=group.ticket.number,
            prompt_id=group.prompt.prompt_id,
            prompt=group.prompt.source,
            answers=tuple(one for one in found if isinstance(one, Answer)),
            unrevised=tuple(one for one in found if isinstance(one, Unrevised)),
            scorer_version=next((version for _, version in done if version), ""),
        )

    async def _one(self, group: RolloutGroup, index: int) -> tuple[Answer | Unrevised, str]:
        """Revise and score one response. Return it with the version of its scorer, "" if unrevised."""
        first, how = group.rollouts[index], self.how
        text = self.decode(first.response_ids.tolist())
        place = group.ticket.number * len(group.rollouts) + index
        stream = self.first_stream + place * (requests_of(how) + 1)
        seed = f"{self.seed}/{group.ticket.number}/{index}"
        principles = drawn(how.principles, how.rounds, seed)
        chain = Chain(problem="empty_response")
        if text.strip():
            chain = await revise(
                prompt_text(group.prompt.source),
                text,
                principles,
                how,
                lambda number, request: self.asker.ask(stream + 1 + number, request),
            )
        last = None if chain.last is None or chain.problem else self._tokens(first, chain.last)
        if last is None:
            lost = Unrevised(
                text=text,
                num_tokens=len(first.response_ids),
                problem=chain.problem or "altered_revision",
                rounds=tuple(chain.rounds),
                unusable=dict(chain.unusable),
            )
            return lost, ""
        return await self._score_both(group.prompt, (first, last), chain, stream)

    def _tokens(self, first: Rollout, reply: Reply) -> Rollout | None:
        """Return the revision as a response to the data set's prompt.

        None where the tokenizer cannot write the revision's text.
        """
        if reply.rollout is not None:
            ids = reply.rollout.response_ids
        else:
            ids = np.array(self.encode(reply.text), dtype=np.int32)
            if self.decode(ids.tolist()).strip() != reply.text.strip():
                return None
        return replace(
            first,
            response_ids=ids,
            sampled_logprobs=np.zeros(len(ids), dtype=np.float32),
            versions=np.full(len(ids), self.version, dtype=np.int32),
            response_mask=np.ones(len(ids), dtype=bool),
            finish_reason=FinishReason.STOP,
        )

    async def _score_both(
        self, prompt: Prompt, both: tuple[Rollout, Rollout], chain: Chain, stream: int
    ) -> tuple[Answer, str]:
        """Score the first response and its last revision together."""
        ticket = Ticket(number=stream, version=self.version)
        rollouts = tuple(
            replace(rollout, rollout_id=f"{ticket.group_id}/{index}")
            for index, rollout in enumerate(both)
        )
        found = await self.score(RolloutGroup(ticket=ticket, prompt=prompt, rollouts=rollouts))
        first, last = (answer_of(own, self.decode) for own in found.scored)
        revised = Revised(
            text=last.text,
            reward=last.reward,
            parts=last.parts,
            num_tokens=last.num_tokens,
            rounds=tuple(chain.rounds),
            unusable=dict(chain.unusable),
        )
        return replace(first, revised=revised), found.scored[0].scorer_version


def answer_of(
    own: ScoredRollout,
    decode: Callable[[Sequence[int]], str],
    steps: tuple[tuple[float, ...], ...] | None = None,
) -> Answer:
    """Return the answer that is kept of a scored response."""
    parts: Mapping[str, float] = {**own.reward_parts, **own.watched}
    return Answer(
        text=decode(own.rollout.response_ids.tolist()),
        reward=float(own.reward),
        parts={name: float(part) for name, part in parts.items() if math.isfinite(part)},
        num_tokens=len(own.rollout.response_ids),
        cut=own.rollout.finish_reason == FinishReason.LENGTH,
        step_rewards=steps,
    )


T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAsker:
    """Asks the generation pool.

    `sample` returns one response to a prompt. `encode` renders a request like the data set's prompts.
    """

    sample: Callable[[Ticket, Prompt, Sampling], Awaitable[RolloutGroup]]
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Sequence[int]], str]
    sampling: Sampling
    max_prompt_tokens: int
    version: int

    async def ask(self, number: int, request: str) -> Reply | None:
        """Return the pool's reply, or None for a request longer than `max_prompt_tokens`.

        Waits for: the pool.
        """
        ids = self.encode(request)
        if len(ids) > self.max_prompt_tokens:
            return None
        prompt = Prompt(prompt_id=f"request-{number}", token_ids=ids, source=request)
        group = await self.sample(
            Ticket(number=number, version=self.version), prompt, self.sampling
        )
        [rollout] = group.rollouts
        return Reply(
            text=self.decode(rollout.response_ids.tolist()),
            cut=rollout.finish_reason == FinishReason.LENGTH,
            rollout=rollout,
        )


class Asking(Protocol):
    def ask(self, question: Any, deadline: float) -> Any:
        """Return the server's answer to `question`, like `Server.ask`."""
        ...


@dataclass(slots=True)
class EndpointAsker:
    """Asks a chat endpoint."""

    section: ChatEndpoint
    server: Asking
    _slots: asyncio.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self._slots = asyncio.Semaphore(self.section.parallel)

    @classmethod
    def of(cls, section: ChatEndpoint) -> EndpointAsker:
        """Build the asker. Raises `ConfigError` if the environment variable of its key is not set."""
        return cls(section, Server(section, PATH))

    async def ask(self, number: int, request: str) -> Reply | None:
        """Return the endpoint's reply.

        Raises `ScoringError` where no attempt succeeds. Waits for: a reply, at most all attempts and
        the pauses between them.
        """
        own = self.section
        question = question_of(own.model, request, own.temperature, own.max_tokens)
        longest_s = own.attempts * (own.attempt_s + min(own.backoff_s * 2**own.attempts, 30.0))
        try:
            async with self._slots:
                answer = await in_thread(
                    lambda: self.server.ask(question, time.monotonic() + longest_s)
                )
            return Reply(text=content_of(answer).strip(), cut=is_cut(answer))
        except RewardFailure as failure:
            raise ScoringError(f"stage.revise.endpoint: {failure}") from failure


async def in_thread(call: Callable[[], T]) -> T:
    """Run `call`, which must have a deadline, in a daemon thread. Return or raise what it does.

    When the caller is cancelled the thread finishes the call, and its outcome is dropped.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()

    def finish(value: T | None, error: Exception | None) -> None:
        if not done.done():
            done.set_result(cast(T, value)) if error is None else done.set_exception(error)

    def work() -> None:
        value, error = None, None
        try:
            value = call()
        # Everything it raises is handed to who waits.
        except Exception as caught:
            error = caught
        with suppress(RuntimeError):  # the loop is closed: no caller waits for the outcome
            loop.call_soon_threadsafe(finish, value, error)

    threading.Thread(target=work, name="endpoint", daemon=True).start()
    return await done
