"""The requests that an engine has handed to vLLM: from plain values, and back to plain values.

Promises:
- a request is answered once, with all its samples or with an error that names it;
- with `salted`, a request carries the version of its first step as vLLM's `cache_salt`, which is
  part of the key of every cached block: no request starts from keys and values that the weights
  of another version computed. One that waits while the version changes has had no step, and takes
  the new salt; one that has had a step keeps its salt, and with it what it computed itself.

Everything here runs on the engine's stepping thread, between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from rlhf_cluster.errors import DataError, WorkerError
from rlhf_cluster.generation.engine import (
    Request,
    Sample,
)

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.llm_engine import LLMEngine

Answer = tuple["asyncio.Future[Any]", Any]  # an exception instance is raised, all else returned


@dataclass(slots=True, kw_only=True)
class _InFlight:
    request: Request
    answer: asyncio.Future[list[Sample]]
    sequences: Sequence[Any]  # vLLM's own requests, one a sample, where salts are kept


@dataclass(slots=True)
class Totals:
    """Tokens since the start, of answered requests.

    `num_prefix` are prompt tokens that the cache was asked for, `num_cached` those that it had; vLLM
    tells both of one sample a request, the last to end. Of `num_drafted` proposed tokens `num_accepted`
    were taken.
    """

    num_sampled: int = 0
    num_prefix: int = 0
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def add(self, output: Any) -> None:
        """`output`: a finished `RequestOutput`."""
        self.num_prefix += len(output.prompt_token_ids or ())
        self.num_cached += output.num_cached_tokens or 0
        for choice in output.outputs:
            self.num_sampled += len(choice.token_ids)
            drafts = choice.spec_decode_metrics
            if drafts is not None:
                self.num_drafted += drafts.num_draft_tokens
                self.num_accepted += sum(taken * n for taken, n in enumerate(drafts.histogram))


class Requests:
    """All requests of one engine that are not answered yet."""

    def __init__(self, llm: LLMEngine, scheduler: Any, salted: bool, version: int) -> None:
        """`version`: of the weights that the engine starts with."""
        from vllm.exceptions import VLLMClientError

        self._llm = llm
        self._scheduler = scheduler
        self._salted = salted
        self._salt = str(version)
        self._refusals = (ValueError, VLLMClientError)
        self._in_flight: dict[str, _InFlight] = {}
        self.totals = Totals()

    def __len__(self) -> int:
        return len(self._in_flight)

    def add(self, request: Request, answer: asyncio.Future[list[Sample]]) -> None:
        """Raises `DataError` when vLLM refuses the request, or has one of the same name."""
        if request.request_id in self._in_flight:
            raise DataError(f"request {request.request_id} is already running")
        sequences = self._submit(request)
        self._in_flight[request.request_id] = _InFlight(
            request=request, answer=answer, sequences=sequences
        )

    def abort(self, request_id: str) -> None:
        if self._in_flight.pop(request_id, None) is not None:
            self._llm.abort_request([request_id])

    def collect(self, outputs: Sequence[Any]) -> list[Answer]:
        """The answers that a step's outputs, of `RequestOutput`, complete."""
        answers: list[Answer] = []
        for output in outputs:
            done = self._in_flight.pop(output.request_id, None)
            if done is None:  # aborted in this very step
                continue
            try:
                samples = [_to_sample(output.request_id, choice) for choice in output.outputs]
            except WorkerError as error:
                answers.append((done.answer, error))
                continue
            self.totals.add(output)
            answers.append((done.answer, samples))
        return answers

    def drop_all(self) -> list[asyncio.Future[Any]]:
        """Forget every request; returns the answers that are still owed."""
        owed: list[asyncio.Future[Any]] = [flight.answer for flight in self._in_flight.values()]
        self._in_flight.clear()
        return owed

    def follow(self, version: int) -> None:
        """Steps from here on run the weights of `version`."""
        self._salt = str(version)
        if not self._salted:
            return
        from vllm.v1.request import RequestStatus

        for request_id, flight in self._in_flight.items():
            if all(s.status is RequestStatus.WAITING for s in flight.sequences):
                self._llm.abort_request([request_id])
                flight.sequences = self._submit(flight.request)

    def _submit(self, request: Request) -> Sequence[Any]:
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.prompt_ids}
        if self._salted:
            prompt["cache_salt"] = self._salt
        try:
            self._llm.add_request(request.request_id, prompt, sampling_params(request))  # type: ignore[arg-type]
        except self._refusals as error:
            raise DataError(f"vLLM refused request {request.request_id}: {error}") from error
        if not self._salted:
            return ()
        newest = reversed(self._scheduler.requests.values())
        return tuple(islice(newest, request.num_samples))


def sampling_params(request: Request) -> SamplingParams:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=request.num_samples,
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=request.seed,
        logprobs=0,
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _to_sample(request_id: str, choice: CompletionOutput) -> Sample:
    """Plain values of one finished sequence. Raises `WorkerError` when something is missing."""
    token_ids, flat = list(choice.token_ids), choice.logprobs
    if choice.finish_reason not in ("stop", "length"):
        raise WorkerError(
            f"request {request_id} ended with {choice.finish_reason!r}, not with stop or length"
        )
    if flat is None or list(flat.token_ids) != token_ids:  # type: ignore[union-attr]
        raise WorkerError(
            f"request {request_id}: vLLM returned log-probabilities of other tokens than the "
            f"{len(token_ids)} sampled ones"
        )
    return Sample(
        token_ids=token_ids,
        logprobs=list(flat.logprobs),  # type: ignore[union-attr]
        version_spans=[(int(s.version), s.start, s.end) for s in choice.weight_versions or ()],
        finish_reason=choice.finish_reason,
    )
