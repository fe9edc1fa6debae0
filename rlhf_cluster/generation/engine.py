"""Port between a generation worker and an inference engine.

`actors.vllm.vllm_engine` implements it with vLLM, and a scripted engine in `tests/` for tests. This
module does not import vllm. The messages are plain values, so no other process has to import it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

from rlhf_cluster.errors import WorkerError
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.slow_disk import run_in_thread
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
    """One response: token ids as sampled, their log-probabilities, and the version of each span."""

    token_ids: list[int]
    logprobs: list[float]
    version_spans: list[tuple[int, int, int]]  # (weight version, first token, one past the last)
    finish_reason: str  # "stop" or "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedWeights:
    """Weights that an engine reports after an update."""

    version: int
    digest: str
    num_tensors: int
    pause_s: float  # seconds for which sampling was paused


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
        After any other error, or when the call is cancelled, the weights are unknown until a later
        call returns (`WeightGuard`). No other call changes the weights: an engine never sleeps.
        """
        ...

    def stats(self) -> Mapping[str, float]:
        """Return current numbers: `num_running`, `num_waiting`, KV-cache use, token counters.

        `num_waiting` counts requests that wait to be added to the batch.
        """
        ...

    def check(self) -> None:
        """Raise `WorkerError` with the cause when the engine can no longer serve."""
        ...

    async def close(self) -> None: ...


async def read_beside(read: Callable[[], _T], deadline: Deadline, stop_s: float = _CANCEL_S) -> _T:
    """Run `read`, which checks `deadline`, in a separate thread, and return its result.

    Waits for: the end of `read`. A cancelled call cancels `deadline`. It returns when the thread has
    stopped, so that no later read overlaps it, or after `stop_s`, when the thread hangs in a storage
    that does not answer.
    """
    reading = asyncio.ensure_future(run_in_thread(read))
    try:
        return await asyncio.shield(reading)
    except asyncio.CancelledError:
        deadline.cancel()
        done, _ = await asyncio.wait({reading}, timeout=stop_s)
        for stopped in done:
            stopped.exception()
        raise


class WeightGuard:
    """Guard that knows whether an engine has exactly one complete version, as it was published.

        whole --a version is refused before anything is replaced--> whole, as before
        whole --a replacement breaks off, or is not what was published--> lost
        lost  --a version is refused--> lost
        any   --a whole version is loaded--> whole

    An engine also samples from half of a version, from freed memory, or from another run's weights,
    without an error. So a caller calls `check` before it asks for samples, and again, with the mark
    that it got, when the samples have arrived.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._lost: str | None = None
        self._last_loss = ""
        self._num_losses = 0

    def check(self, mark: int | None = None) -> int:
        """Check that the weights are whole, and have been since `mark`. Return a mark of this moment.

        Raises `WorkerError` where they are not, or were not.
        """
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
        """Record that the weights are not whole any more. `cause` is the reason in errors."""
        self._lost = self._last_loss = cause
        self._num_losses += 1

    def restore(self) -> None:
        """Record that a complete version is loaded and verified."""
        self._lost = None
