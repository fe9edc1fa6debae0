"""vLLM as the engine of a generation worker: one engine in this process, stepped by one thread.

    event loop                              stepping thread
    generate, load_weights, close  --command-->  between two steps
    futures                        <--answers--  after a step

Promises:
- only the stepping thread touches vLLM (reading a version from disk on a single worker aside, which
  goes on beside sampling);
- commands run between steps, so a weight update never meets a half-done step, and every token is
  labelled with the version that sampled it;
- an update keeps all requests; with `cache_on_update = "recompute"` their KV caches are computed
  again with the new weights, so that every later token depends on one version only;
- a request that vLLM refuses fails alone; an exception in a step or while weights are replaced
  ends the engine: every waiting call raises `WorkerError`, and so do `check` and later calls.

The process needs `engine_environment` set before it starts, and must not train: vLLM takes
`torch.set_num_threads` away.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.engine import Engine, LoadedWeights, Request, Sample
from actors.vllm_arguments import (
    engine_arguments,
    engine_environment,
    probe_vllm,
    refuse_unknown_arguments,
)
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import DataError, RlhfError, StalledError, WeightError, WorkerError
from rlhf_cluster.records import WeightVersion

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VllmEngine", "engine_environment", "make_engine"]

_CLOSE_TIMEOUT_S = 30.0
INITIAL_VERSION = -1  # of the weights in the model folder, before the first update

Answer = tuple["asyncio.Future[Any]", Any]  # an exception instance is raised, all else returned


def make_engine(config: RunConfig, model_dir: str, worker_name: str) -> VllmEngine:
    return VllmEngine(config, model_dir, worker_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """`run` is called on the stepping thread. Its failure ends the engine when `fatal`."""

    run: Callable[[], Any]
    answer: asyncio.Future[Any] | None = None
    fatal: bool = False


class VllmEngine(Engine):
    """`Engine` over `vllm.LLMEngine`; the same class on CPU and on GPUs."""

    def __init__(self, config: RunConfig, model_dir: str, worker_name: str) -> None:
        self._arguments = engine_arguments(config, model_dir, worker_name)
        self._name = worker_name
        self._recompute = config.generation.cache_on_update == "recompute"
        self._read_beside_steps = config.generation.tensor_parallel_size == 1
        self._start_timeout_s = config.run.start_timeout_s
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.Lock()  # over _failure and the decision to queue a command
        self._failure: RlhfError | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._llm: LLMEngine
        self._scheduler: Any  # read by `stats`; vLLM's own metrics would cost some of every step
        self._sampling_params: Callable[..., Any]
        self._refusals: tuple[type[Exception], ...]
        self._updating = asyncio.Lock()
        # The stepping thread's own.
        self._waiting: dict[str, asyncio.Future[list[Sample]]] = {}
        self._closing = False
        self._num_tokens = 0
        self._num_steps = 0

    async def start(self) -> None:
        """Import vLLM and load the model. Raises `WorkerError`, `ConfigError`, `StalledError`."""
        self._loop = asyncio.get_running_loop()
        started = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name=f"engine-{self._name}", daemon=True
        )
        self._thread.start()
        try:
            await asyncio.wait_for(started, self._start_timeout_s)
        except TimeoutError:
            raise StalledError(
                f"{self._name}: vLLM was not up after run.start_timeout_s = "
                f"{self._start_timeout_s:g} s"
            ) from None

    async def generate(self, request: Request) -> list[Sample]:
        """Waits for: the last sample of the request. Unblocked by: steps, failure, close.

        Raises `DataError` when vLLM refuses the request, `WorkerError` when the engine is dead.
        """
        answer: asyncio.Future[list[Sample]] = self._loop.create_future()
        self._post(_Command(run=lambda: self._add(request, answer), answer=answer))
        try:
            return await answer
        except asyncio.CancelledError:
            if self._failure is None:
                self._post(_Command(run=lambda: self._abort(request.request_id)))
            raise

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        """Stage `version`, then swap it in between two steps. One update at a time."""
        stage = {"version": version.version, "path": version.path, "digest": version.digest}
        async with self._updating:
            self.check()
            if self._read_beside_steps:
                reports = await asyncio.to_thread(self._rpc, "stage_version", stage)
            else:
                reports = await self._call(lambda: self._rpc("stage_version", stage))
            staged = _agreed(reports, version)
            pause_s = await self._call(lambda: self._apply(version.version), fatal=True)
        return LoadedWeights(
            version=version.version,
            digest=staged["digest"],
            num_tensors=staged["num_tensors"],
            pause_s=pause_s,
        )

    def stats(self) -> Mapping[str, float]:
        """Sequences sampled and queued, share of the KV cache in use, and totals since start."""
        num_running, num_waiting = self._scheduler.get_request_counts()
        return {
            "num_running": float(num_running),
            "num_waiting": float(num_waiting),
            "kv_cache_use_fraction": float(self._scheduler.get_kv_cache_usage()),
            "num_requests": float(len(self._waiting)),
            "num_tokens_total": float(self._num_tokens),
            "num_steps_total": float(self._num_steps),
        }

    def check(self) -> None:
        if self._failure is not None:
            raise _again(self._failure)
        if self._thread is None or not self._thread.is_alive():
            raise WorkerError(f"{self._name}: the engine is not running; call start first")

    async def close(self) -> None:
        """Waits for: the step under way, then vLLM's shutdown. `StalledError` if it hangs."""
        if self._thread is None:
            return
        self._commands.put(_Command(run=self._stop))
        await asyncio.to_thread(self._thread.join, _CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise StalledError(
                f"{self._name}: the stepping thread still runs {_CLOSE_TIMEOUT_S:g} s after close; "
                "end the process"
            )

    # Event loop to stepping thread.

    async def _call(self, run: Callable[[], Any], fatal: bool = False) -> Any:
        answer = self._loop.create_future()
        self._post(
            _Command(run=lambda: self._deliver([(answer, run())]), answer=answer, fatal=fatal)
        )
        return await answer

    def _post(self, command: _Command) -> None:
        with self._lock:  # held for a queue operation only, never while waiting
            self.check()
            self._commands.put(command)

    # The stepping thread.

    def _run(self, started: asyncio.Future[None]) -> None:
        """Waits for: a command when idle. Unblocked by: any call above, `close` among them."""
        cause: Exception | None = None
        try:
            self._build()
            self._deliver([(started, None)])
            while not self._closing:
                self._run_commands(wait=not self._llm.has_unfinished_requests())
                if self._llm.has_unfinished_requests() and not self._closing:
                    self._collect(self._llm.step())
                    self._num_steps += 1
        except Exception as error:
            cause = error
        finally:
            self._end(cause, started)

    def _build(self) -> None:
        probe_vllm()
        from vllm import SamplingParams
        from vllm.engine.arg_utils import EngineArgs
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.llm_engine import LLMEngine

        refuse_unknown_arguments(self._arguments, EngineArgs)

        def sampling_params(request: Request) -> SamplingParams:
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

        self._sampling_params = sampling_params
        self._refusals = (ValueError, VLLMClientError)
        self._llm = LLMEngine.from_engine_args(EngineArgs(**self._arguments))
        self._scheduler = self._llm.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        self._rpc("init_weight_transfer_engine", {"init_info": {}})
        self._llm.set_weight_version(str(INITIAL_VERSION))

    def _run_commands(self, wait: bool) -> None:
        while not self._closing:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return
            wait = False
            try:
                command.run()
            except Exception as error:
                if command.answer is not None:
                    self._deliver([(command.answer, self._named(error, command.fatal))])
                if command.fatal or command.answer is None:
                    raise

    def _add(self, request: Request, answer: asyncio.Future[list[Sample]]) -> None:
        if request.request_id in self._waiting:
            raise DataError(f"{self._name}: request {request.request_id} is already running")
        prompt = {"type": "token", "prompt_token_ids": request.prompt_ids}
        try:
            self._llm.add_request(request.request_id, prompt, self._sampling_params(request))  # type: ignore[arg-type]
        except self._refusals as error:
            raise DataError(f"vLLM refused request {request.request_id}: {error}") from error
        self._waiting[request.request_id] = answer

    def _abort(self, request_id: str) -> None:
        if self._waiting.pop(request_id, None) is not None:
            self._llm.abort_request([request_id])

    def _apply(self, version: int) -> float:
        started = time.perf_counter()
        self._rpc("start_weight_update")
        self._rpc("update_weights", {"update_info": {"version": version}})
        self._rpc("finish_weight_update")
        if self._recompute:
            self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.set_weight_version(str(version))
        return time.perf_counter() - started

    def _rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        return self._llm.collective_rpc(method, kwargs=kwargs or {})

    def _collect(self, outputs: Sequence[Any]) -> None:  # of RequestOutput
        answers: list[Answer] = []
        for output in outputs:
            answer = self._waiting.pop(output.request_id, None)
            if answer is None:  # aborted in this very step
                continue
            try:
                samples = [_to_sample(output.request_id, choice) for choice in output.outputs]
            except WorkerError as error:
                answers.append((answer, error))
                continue
            self._num_tokens += sum(len(sample.token_ids) for sample in samples)
            answers.append((answer, samples))
        self._deliver(answers)

    def _stop(self) -> None:
        self._closing = True

    def _deliver(self, answers: list[Answer]) -> None:
        if answers and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_settle, answers)

    def _named(self, error: Exception, fatal: bool) -> RlhfError:
        if isinstance(error, RlhfError) and not fatal:
            return error
        failure = WorkerError(f"{self._name}: vLLM failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _end(self, cause: Exception | None, started: asyncio.Future[None]) -> None:
        """Mark the engine dead, answer everyone who waits, release vLLM."""
        if cause is None:
            failure: RlhfError = WorkerError(f"{self._name}: the engine is closed")
        else:
            failure = self._named(cause, fatal=not self._is_refusal(cause))
        with self._lock:
            self._failure = failure
        orphans: list[asyncio.Future[Any]] = [started, *self._waiting.values()]
        self._waiting.clear()
        while not self._commands.empty():
            answer = self._commands.get_nowait().answer
            orphans += [answer] if answer is not None else []
        self._deliver([(answer, _again(failure)) for answer in orphans])
        if hasattr(self, "_llm"):
            self._llm.engine_core.shutdown()

    def _is_refusal(self, cause: Exception) -> bool:
        """A start that this project refused, as opposed to vLLM breaking down."""
        return isinstance(cause, RlhfError) and not hasattr(self, "_llm")


def _again(failure: RlhfError) -> RlhfError:
    """A copy to raise: one instance raised many times would collect all their tracebacks."""
    copy = type(failure)(str(failure))
    copy.__cause__ = failure.__cause__
    return copy


def _settle(answers: list[Answer]) -> None:
    for answer, result in answers:
        if answer.done():  # cancelled meanwhile
            continue
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)


def _agreed(reports: list[dict[str, Any]], version: WeightVersion) -> dict[str, Any]:
    """The one report of all parts of a tensor-parallel worker. Raises `WeightError`."""
    for report in reports:
        if "error" in report:
            raise WeightError(f"version {version.version} was not loaded: {report['error']}")
    if any(report != reports[0] for report in reports):
        raise WeightError(
            f"version {version.version} was not loaded: the parts of the worker read different "
            f"contents: {reports}. Check that all of them see the same {version.path}"
        )
    return reports[0]


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
