"""Who gives critiques and revisions: the model that is sampled from, or a chat endpoint.

Promises: the pool's reply to a request follows from the run's seed and the request's number alone; an
endpoint has at most `parallel` requests at once, and is asked from threads that do not hold up the end
of the process. What cannot be had from either raises: no reply is made up.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar, cast

import numpy as np

from rlhf_cluster.config.revise import ChatEndpoint
from rlhf_cluster.errors import ScoringError
from rlhf_cluster.generating.revising import Reply
from rlhf_cluster.records import FinishReason, Prompt, RolloutGroup, Sampling, Ticket
from rlhf_cluster.rewards.chat import PATH, content_of, is_cut, question_of
from rlhf_cluster.rewards.failure import RewardFailure
from rlhf_cluster.rewards.remote import Server

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolAsker:
    """Asks the generation pool. `sample` gives one response to a prompt; `encode` renders a request as
    the data set's prompts are."""

    sample: Callable[[Ticket, Prompt, Sampling], Awaitable[RolloutGroup]]
    encode: Callable[[str], np.ndarray]
    decode: Callable[[Sequence[int]], str]
    sampling: Sampling
    max_prompt_tokens: int
    version: int

    async def ask(self, number: int, request: str) -> Reply | None:
        """Waits for: the pool. None for a request over `max_prompt_tokens`."""
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
        """As `Server.ask`."""
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
        """Raises `ConfigError` where its key is not set."""
        return cls(section, Server(section, PATH))

    async def ask(self, number: int, request: str) -> Reply | None:
        """Waits for: an answer, at most all attempts and the pauses between them."""
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
    """What `call` gives or raises; it has a deadline of its own. Cancelled, it is left to a daemon
    thread."""
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
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(finish, value, error)

    threading.Thread(target=work, name="endpoint", daemon=True).start()
    return await done
