"""The port between a generation worker and an inference engine.

`actors.vllm_engine` implements it with vLLM; a scripted engine in `tests/` implements it for tests.
Nothing here imports vllm: the messages are plain values, so no other process ever has to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from rlhf_cluster.records import WeightVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One prompt to sample `num_samples` times. The seed fixes the samples of this request."""

    request_id: str
    prompt_ids: list[int]
    num_samples: int
    max_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One response: token ids as sampled, their log-probabilities, and who sampled which span."""

    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[tuple[int, int, int]]  # (weight version, first token, one past the last)
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """What an engine says it runs after an update."""

    version: int
    digest: str
    num_tensors: int
    pause_s: float  # how long sampling stood still


class Engine(Protocol):
    async def start(self) -> None:
        """Load the model. Nothing else may be called before it returned."""
        ...

    async def generate(self, request: Request) -> list[Sample]:
        """Sample a request. Many run at once. Cancelling the call aborts the request."""
        ...

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        """Swap weights in flight: requests are paused and kept, never aborted.

        Raises `WeightError` and leaves the old weights serving when the version cannot be read.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Current numbers: requests running and waiting, KV-cache use, token counters."""
        ...

    def check(self) -> None:
        """Raise `WorkerError` with the cause when the engine can no longer serve."""
        ...

    async def close(self) -> None: ...
