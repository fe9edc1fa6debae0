"""The port between a generation worker and an inference engine.

`actors.vllm.vllm_engine` implements it with vLLM; a scripted engine in `tests/` implements it for
tests. Nothing here imports vllm: the messages are plain values, so no other process ever has to.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rlhf_cluster.errors import WorkerError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.slow_disk import aside
from rlhf_cluster.weights.transports.transport import Deadline

_T = TypeVar("_T")
_CANCEL_S = 10.0


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
        After any other error, or when the call is cancelled, nobody knows what the weights are
        until a later call returns (`WeightGuard`). Weights change here alone: there is no sleep.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Current numbers: `num_running`, `num_waiting` (requests that wait for a place in the batch),
        KV-cache use, token counters."""
        ...

    def check(self) -> None:
        """Raise `WorkerError` with the cause when the engine can no longer serve."""
        ...

    async def close(self) -> None: ...


async def read_beside(read: Callable[[], _T], deadline: Deadline, stop_s: float = _CANCEL_S) -> _T:
    """`read()` in a thread of its own, which looks at `deadline`.

    Waits for: its end. A cancelled call cancels `deadline`, and returns when the thread has stopped,
    so that no later read meets it, or after `stop_s`: it hangs in a storage that does not answer.
    """
    reading = asyncio.ensure_future(aside(read))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        deadline.cancel()
        done, _ = await asyncio.wait({reading}, timeout=stop_s)
        for stopped in done:
            stopped.exception()
        raise


class WeightGuard:
    """Whether the weights behind an engine are whole: one version's, all of it, as published.

        whole --a version is refused before anything is replaced--> whole, as before
        whole --a replacement breaks off, or is not what was published--> lost
        lost  --a version is refused--> lost
        any   --a whole version is loaded--> whole

    An engine samples from half of a version, from memory that was given back, or from another
    run's weights as readily as from its own. So whoever asks it to sample calls `check` before, and
    again with the mark that it got when the answer is there.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lost: str | None = None
        self._last_loss = ""
        self._num_losses = 0

    def check(self, mark: int | None = None) -> int:
        """A mark of this moment. Raises `WorkerError` unless the weights are whole, and have been
        ever since `mark`."""
        if self._lost is not None:
            raise WorkerError(
                f"{self._name}: its weights are lost ({self._lost}); it samples nothing until a whole "
                "version is loaded. Pull one, or replace the worker"
            )
        if mark is not None and mark != self._num_losses:
            raise WorkerError(
                f"{self._name}: its weights were lost while it sampled ({self._last_loss}). Sample "
                "again"
            )
        return self._num_losses

    def lose(self, cause: str) -> None:
        self._lost = self._last_loss = cause
        self._num_losses += 1

    def restore(self) -> None:
        """A whole version is loaded and verified."""
        self._lost = None
