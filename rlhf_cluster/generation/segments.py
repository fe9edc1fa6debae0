"""Sampling of a group in segments: the requests of the next segment, and the group with its samples.

    begin -> PartialGroup -> plan -> requests -> engine -> extend -> PartialGroup -> ... -> complete

Each segment samples at most `segment_tokens` tokens more of every unfinished response, from prompt
and tokens so far. Without that limit, a complete response is one segment.

Promises:
- A segment appends tokens, and never changes those of earlier segments.
- A response ends where it would end in one call: at its end token, or with `max_tokens` tokens in
  all. The run's configuration ensures that these fit into the engine's context.
- A random stream is determined by run seed, group, sample and the number of tokens before it. So a
  segment that is issued again under the same weights is the same on any worker, and no two samples,
  segments or groups share a stream.
- Before the first token, the samples of a group are one request, which computes the prompt once.
  After it, each sample is a separate request.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rlhf_cluster.errors import RecordError, WorkerError
from rlhf_cluster.generation.engine import (
    Request,
    Sample,
)
from rlhf_cluster.records import (
    FinishReason,
    PartialGroup,
    PartialResponse,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Ticket,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One request of a segment, and the indices of the responses that it continues."""

    request: Request
    places: range


def begin(ticket: Ticket, sampling: Sampling, started_s: float) -> PartialGroup:
    """Return a group without tokens."""
    names = [(str(index), sampling.temperature) for index in range(sampling.num_samples)]
    if sampling.greedy_baseline:
        names.append(("greedy", 0.0))
    responses = tuple(
        PartialResponse(
            rollout_id=f"{ticket.group_id}/{name}",
            response_ids=np.empty(0, dtype=np.int32),
            sampled_logprobs=np.empty(0, dtype=np.float32),
            versions=np.empty(0, dtype=np.int32),
            temperature=temperature,
        )
        for name, temperature in names
    )
    return PartialGroup(group_id=ticket.group_id, responses=responses, started_s=started_s)


def plan(
    group: PartialGroup,
    prompt: Prompt,
    sampling: Sampling,
    segment_tokens: int | None,
    run_seed: int,
    numbers: Iterator[int],
) -> list[Part]:
    """Return the requests of the next segment. `numbers` makes their ids unique within a worker."""
    prompt_ids = prompt.token_ids.tolist()

    def part(places: range, seed: int) -> Part:
        first = group.responses[places.start]
        tokens_left = sampling.max_tokens - len(first.response_ids)
        request = Request(
            request_id=f"{group.group_id}-{next(numbers)}",
            prompt_ids=prompt_ids + first.response_ids.tolist(),
            num_samples=len(places),
            max_tokens=min(tokens_left, segment_tokens or tokens_left),
            temperature=first.temperature,
            seed=seed,
        )
        return Part(request=request, places=places)

    if group.num_tokens == 0:
        together = [range(sampling.num_samples)]
        if sampling.greedy_baseline:
            together.append(range(sampling.num_samples, sampling.num_samples + 1))
        return [part(places, group_seed(run_seed, group.group_id)) for places in together]
    return [
        part(range(place, place + 1), segment_seed(run_seed, response))
        for place, response in enumerate(group.responses)
        if response.finish_reason is None
    ]


def extend(
    group: PartialGroup,
    parts: Sequence[Part],
    answers: Sequence[Sequence[Sample]],
    sampling: Sampling,
    worker: str,
) -> PartialGroup:
    """Append what `worker` sampled to the group. Raises `WorkerError`, `RecordError` on bad answers."""
    responses = list(group.responses)
    for part, samples in zip(parts, answers, strict=True):
        if len(samples) != len(part.places):
            raise WorkerError(
                f"{worker}: group {group.group_id} came back with {len(samples)} samples, "
                f"{len(part.places)} were asked for"
            )
        for place, sample in zip(part.places, samples, strict=True):
            responses[place] = _append(responses[place], sample, sampling.max_tokens, worker)
    return replace(group, responses=tuple(responses))


def _append(
    response: PartialResponse, sample: Sample, max_tokens: int, worker: str
) -> PartialResponse:
    versions = expand_spans(sample.version_spans, len(sample.token_ids))
    num_tokens = len(response.response_ids) + len(sample.token_ids)
    goes_on = sample.finish_reason == FinishReason.LENGTH and num_tokens < max_tokens
    again = response.workers[-1:] == (worker,)
    return replace(
        response,
        response_ids=_concat(response.response_ids, sample.token_ids),
        sampled_logprobs=_concat(response.sampled_logprobs, sample.logprobs),
        versions=_concat(response.versions, versions),
        workers=response.workers if again else (*response.workers, worker),
        finish_reason=None if goes_on else FinishReason(sample.finish_reason),
    )


def _concat(before: np.ndarray, added: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.concatenate([before, np.asarray(added, dtype=before.dtype)])


def complete(
    group: PartialGroup, ticket: Ticket, prompt: Prompt, sampling: Sampling, finished_s: float
) -> RolloutGroup:
    """Return the group as records for scoring. Raises `RecordError` if a response is unfinished."""
    rollouts = [_to_rollout(r, prompt, group.started_s, finished_s) for r in group.responses]
    return RolloutGroup(
        ticket=ticket,
        prompt=prompt,
        rollouts=tuple(rollouts[: sampling.num_samples]),
        greedy=rollouts[-1] if sampling.greedy_baseline else None,
    )


def _to_rollout(
    response: PartialResponse, prompt: Prompt, started_s: float, finished_s: float
) -> Rollout:
    if response.finish_reason is None:
        raise RecordError(
            f"rollout {response.rollout_id} is not finished: it has "
            f"{len(response.response_ids)} tokens and no finish reason"
        )
    return Rollout(
        rollout_id=response.rollout_id,
        prompt_id=prompt.prompt_id,
        prompt_ids=prompt.token_ids,
        response_ids=response.response_ids,
        sampled_logprobs=response.sampled_logprobs,
        versions=response.versions,
        response_mask=np.ones(len(response.response_ids), dtype=np.bool_),
        finish_reason=response.finish_reason,
        temperature=response.temperature,
        worker=", ".join(response.workers),
        started_s=started_s,
        finished_s=finished_s,
    )


def group_seed(run_seed: int, group_id: str) -> int:
    """Return the 63-bit seed of a group's random streams, one per sample, for the first segment."""
    return stable_hash(f"{run_seed}/{group_id}", bits=63)


def segment_seed(run_seed: int, response: PartialResponse) -> int:
    """Return the 63-bit seed of the random stream that continues `response`."""
    name = f"{run_seed}/{response.rollout_id}/{len(response.response_ids)}"
    return stable_hash(name, bits=63)


def expand_spans(spans: list[tuple[int, int, int]], num_tokens: int) -> np.ndarray:
    """Return one version per token, [num_tokens] int32.

    Raises `WorkerError` unless the spans tile the tokens.
    """
    edges = [0] + [end for _, _, end in spans]
    lengths = np.diff(edges)
    starts = [start for _, start, _ in spans]
    if edges[-1] != num_tokens or starts != edges[:-1] or (lengths <= 0).any():
        raise WorkerError(f"version spans {spans} do not tile {num_tokens} response tokens")
    versions = [version for version, _, _ in spans]
    return np.repeat(np.asarray(versions, dtype=np.int32), lengths)


def stable_hash(text: str, bits: int) -> int:
    """Return a hash of `text` that is equal in every process, in [0, 2 ** bits); `bits` <= 64."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> (64 - bits)
