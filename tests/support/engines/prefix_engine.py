"""Workers over an engine whose next token follows from what it was given: everything before it, the
version and, above temperature 0, the random stream."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np

from rlhf_cluster.errors import WorkerError
from rlhf_cluster.generation.engine import (
    Engine,
    LoadedWeights,
    Request,
    Sample,
)
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.generation.segments import stable_hash
from rlhf_cluster.records import Prompt, RolloutGroup, Sampling, Ticket
from tests.support.builders.run_configs import tiny_config

TICKET = Ticket(number=7, version=0)
PROMPT = Prompt(prompt_id="p7", token_ids=np.array([5, 9, 3], dtype=np.int32), source="503")
END, NUM_WORDS = 0, 16


class PrefixEngine(Engine):
    """Ends a response with chance 1 / 16 a token."""

    def __init__(self) -> None:
        self.version = 0
        self.requests: list[Request] = []
        self.fail_on: int | None = None  # the number of a request; the others then hang
        self.num_cancelled = 0

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Sample]:
        self.requests.append(request)
        if self.fail_on == len(self.requests):
            raise WorkerError("scripted failure")
        try:
            await asyncio.sleep(0)
            if self.fail_on is not None:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        return [self._sample(request, index) for index in range(request.num_samples)]

    def _sample(self, request: Request, index: int) -> Sample:
        tokens, logprobs = list(request.prompt_ids), []
        stream = f"{request.seed + index}" if request.temperature else "greedy"
        for _ in range(request.max_tokens):
            draw = stable_hash(f"{tokens}/{self.version}/{stream}", bits=32)
            tokens.append(draw % NUM_WORDS)
            logprobs.append(-(draw % 1000) / 1000)
            if tokens[-1] == END:
                break
        return Sample(
            token_ids=tokens[len(request.prompt_ids) :],
            logprobs=logprobs,
            version_spans=[(self.version, 0, len(logprobs))],
            finish_reason="stop" if tokens[-1] == END else "length",
        )

    async def load_weights(self, version: Any) -> LoadedWeights:
        raise NotImplementedError

    def stats(self) -> dict[str, float]:
        return {"num_waiting": 0.0}

    def check(self) -> None: ...

    async def close(self) -> None: ...


_engines: list[PrefixEngine] = []


def make_engine(config: Any, model_dir: str, worker_name: str) -> PrefixEngine:
    return _engines[-1]


async def start_worker(
    segment_tokens: int | None, name: str = "w-0", engine: PrefixEngine | None = None
) -> GenerationWorker:
    _engines.append(engine or PrefixEngine())
    generation = {"max_response_tokens": 56, "segment_tokens": segment_tokens}
    generation = {key: value for key, value in generation.items() if value is not None}
    config = tiny_config(generation=generation, data={"max_prompt_tokens": 8})
    worker = GenerationWorker(config, "unused", name, f"{__name__}:make_engine")
    await worker.start()
    return worker


def sampling(num_samples: int = 4, temperature: float = 1.0, **changes: Any) -> Sampling:
    values = {"max_tokens": 40, "num_samples": num_samples, "temperature": temperature}
    return Sampling(**(values | changes))


async def to_the_end(
    workers: list[GenerationWorker], how: Sampling, ticket: Ticket = TICKET
) -> tuple[RolloutGroup, list[dict[str, Any]]]:
    """The whole group, one segment a worker in turn, and what was said of each segment."""
    partial, metas = None, []
    for worker in itertools.cycle(workers):
        meta, partial = await worker.generate(ticket, PROMPT, how, partial)
        metas.append(meta)
        if isinstance(partial, RolloutGroup):
            assert meta["num_unfinished"] == 0
            return partial, metas
    raise AssertionError


def arrays(group: RolloutGroup) -> list[tuple[Any, ...]]:
    rollouts = [*group.rollouts, *([group.greedy] if group.greedy else [])]
    return [
        (
            r.rollout_id,
            r.response_ids.tolist(),
            r.sampled_logprobs.tolist(),
            r.versions.tolist(),
            r.temperature,
            r.finish_reason,
        )
        for r in rollouts
    ]
