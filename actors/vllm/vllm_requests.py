"""Requests in flight in vLLM: conversion from plain values, and of the results back to plain values.

Promises:
- a request is answered once, with all its samples or with an error that names it, also where vLLM
  refuses it when the weights change;
- with `salted`, a request carries the version of its first step as vLLM's `cache_salt`, which is
  part of the key of every cached block. So no request starts from keys and values that the weights
  of another version computed. A request that waits while the version changes has had no step, and
  gets the new salt. A request that has had a step keeps its salt, and with it its own cached blocks;
- if adapters are served, a request samples with the adapter of its first step to its end, and all its
  tokens are labelled with that version. A waiting request gets the new adapter like the new salt.

Everything here runs on the engine's stepping thread, between two steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from actors.vllm.vllm_adapters import Adapter
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
    sequences: Sequence[Any]  # vLLM's own requests, one per sample; empty unless salted or serving
    adapter: Adapter | None  # the one that it samples with, to its end


@dataclass(slots=True)
class Totals:
    """Token counts of answered requests since the start.

    `num_prefix` counts prompt tokens that were looked up in the cache, `num_cached` those that it had.
    vLLM reports both for one sample per request, the last to end. `num_accepted` of the `num_drafted`
    proposed tokens were accepted.
    """

    num_sampled: int = 0
    num_prefix: int = 0
    num_cached: int = 0
    num_drafted: int = 0
    num_accepted: int = 0

    def add(self, output: Any) -> None:
        """Add the tokens of `output`, a finished `RequestOutput`."""
        self.num_prefix += len(output.prompt_token_ids or ())
        self.num_cached += output.num_cached_tokens or 0
        for choice in output.outputs:
            self.num_sampled += len(choice.token_ids)
            drafts = choice.spec_decode_metrics
            if drafts is not None:
                self.num_drafted += drafts.num_draft_tokens
                self.num_accepted += sum(taken * n for taken, n in enumerate(drafts.histogram))


class Requests:
    """All requests of one engine that have no answer yet."""

    def __init__(
        self, llm: LLMEngine, scheduler: Any, salted: bool, version: int, serves: bool = False
    ) -> None:
        """`version`: that of the engine's first weights. `serves`: whether it serves adapters."""
        from vllm.exceptions import VLLMClientError

        self._llm = llm
        self._scheduler = scheduler
        self._salted = salted
        self._salt = str(version)
        self._first_version = version
        self._serves = serves
        self._adapter: Adapter | None = None
        self._refusals = (ValueError, VLLMClientError)
        self._in_flight: dict[str, _InFlight] = {}
        self.totals = Totals()

    def __len__(self) -> int:
        return len(self._in_flight)

    def add(self, request: Request, answer: asyncio.Future[list[Sample]]) -> None:
        """Submit a request, whose samples or error become the result of `answer`.

        Raises: `DataError` if vLLM refuses the request, or one with the same id is in flight.
        """
        if request.request_id in self._in_flight:
            raise DataError(f"request {request.request_id} is already running")
        sequences = self._submit(request)
        self._in_flight[request.request_id] = _InFlight(
            request=request, answer=answer, sequences=sequences, adapter=self._adapter
        )

    @property
    def adapters_used(self) -> set[int]:
        """Numbers of the adapters that requests in flight sample with."""
        return {f.adapter.number for f in self._in_flight.values() if f.adapter is not None}

    def abort(self, request_id: str) -> None:
        if self._in_flight.pop(request_id, None) is not None:
            self._llm.abort_request([request_id])

    def collect(self, outputs: Sequence[Any]) -> list[Answer]:
        """Return the answers that the outputs of a step, `RequestOutput`s, complete."""
        answers: list[Answer] = []
        for output in outputs:
            done = self._in_flight.pop(output.request_id, None)
            if done is None:  # aborted during this step
                continue
            try:
                version = self._served_version(done)
                samples = [_to_sample(output.request_id, c, version) for c in output.outputs]
            except WorkerError as error:
                answers.append((done.answer, error))
                continue
            self.totals.add(output)
            answers.append((done.answer, samples))
        return answers

    def drop_all(self) -> list[asyncio.Future[Any]]:
        """Forget every request, and return the futures that still need an answer."""
        owed: list[asyncio.Future[Any]] = [flight.answer for flight in self._in_flight.values()]
        self._in_flight.clear()
        return owed

    def follow(self, version: int, adapter: Adapter | None = None) -> list[Answer]:
        """Label all later steps with `version`, whose weights they run.

        If adapters are served, requests that have had no step sample with `adapter`. Returns the errors
        of requests that vLLM does not take again. Any other error is raised: the engine cannot
        continue, since requests may be withdrawn that are not submitted again.
        """
        self._salt, self._adapter = str(version), adapter
        if not (self._salted or self._serves):
            return []
        from vllm.v1.request import RequestStatus

        answers: list[Answer] = []
        for request_id, flight in list(self._in_flight.items()):
            if not all(s.status is RequestStatus.WAITING for s in flight.sequences):
                continue
            try:
                self._llm.abort_request([request_id])
                flight.sequences = self._submit(flight.request)
                flight.adapter = adapter
            except DataError as error:
                del self._in_flight[request_id]
                answers.append((flight.answer, error))
        return answers

    def _served_version(self, flight: _InFlight) -> int | None:
        if not self._serves:
            return None
        return self._first_version if flight.adapter is None else flight.adapter.version

    def _submit(self, request: Request) -> Sequence[Any]:
        prompt: dict[str, Any] = {"type": "token", "prompt_token_ids": request.prompt_ids}
        if self._salted:
            prompt["cache_salt"] = self._salt
        try:
            lora = None if self._adapter is None else self._adapter.lora_request
            params = sampling_params(request)
            self._llm.add_request(request.request_id, prompt, params, lora_request=lora)  # type: ignore[arg-type]
        except self._refusals as error:
            raise DataError(f"vLLM refused request {request.request_id}: {error}") from error
        if not (self._salted or self._serves):
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


def _to_sample(request_id: str, choice: CompletionOutput, served: int | None = None) -> Sample:
    """Convert one finished sequence to plain values. Raises `WorkerError` if a value is missing.

    Args:
        served: version of the adapter that sampled all tokens. vLLM's own labels name the version that
            the engine had at each step, which is that of newer requests.
    """
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
        version_spans=[(int(s.version), s.start, s.end) for s in choice.weight_versions or ()]
        if served is None
        else [(served, 0, len(token_ids))],
        finish_reason=choice.finish_reason,
    )
