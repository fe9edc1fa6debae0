"""Generation engine over vLLM: one engine in this process, stepped by one thread.

    event loop                              stepping thread
    generate, load_weights, close  --command-->  between two steps
    futures                        <--answers--  after a step

Promises:
- only the stepping thread calls vLLM. A single worker reads versions from disk in another thread, while
  sampling continues;
- commands run between steps, so a weight update never interrupts a step, and every token is labelled
  with the version that sampled it;
- an update keeps all requests. `generation.cache_on_update` decides about their caches:
  - "recompute": the caches are computed again with the new weights, so every later token depends on one
    version only;
  - "keep": a running request continues from the caches of the old weights;
  - "salt": the same, but no request starts from caches of other weights (`actors.vllm.vllm_requests`);
- a version that is not newer, as after a failure of the learner, drops all caches. They may have been
  computed by other weights with the same version number;
- if `generation.lora` is "served", an update adds an adapter and replaces nothing. Requests that have
  had a step keep their adapter, all others get the new one (`actors.vllm.vllm_adapters`);
- a request that vLLM refuses fails alone. An exception in a step, or while weights are replaced, ends
  the engine: every waiting call raises `WorkerError`, like `check` and later calls.

The process needs `engine_environment` set before it starts. It must not train, because vLLM disables
`torch.set_num_threads`.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.vllm.vllm_adapters import Adapter, Adapters
from actors.vllm.vllm_arguments import (
    INT8,
    engine_arguments,
    engine_environment,
    probe_vllm,
    refuse_unknown_arguments,
)
from actors.vllm.vllm_requests import (
    Answer,
    Requests,
)
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import RlhfError, StalledError, WeightError, WorkerError
from rlhf_cluster.generation.engine import (
    Engine,
    LoadedWeights,
    Request,
    Sample,
    read_beside,
)
from rlhf_cluster.records import WeightVersion
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.weights.formats.int8 import write_start_folder
from rlhf_cluster.weights.transports.transport import (
    Deadline,
)

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VllmEngine", "engine_environment", "make_engine"]

_CLOSE_TIMEOUT_S = 30.0
_READ_SHARE = 0.8  # of a pull's deadline, for reading; the rest is for the swap and the answer
_HANG_SHARE = 0.85  # of a pull's deadline, after which a read that hangs is abandoned
_STOP_SHARE = 0.1  # of _HANG_SHARE's time, for a read to end after its own deadline
_POLL_S = 0.02  # between two checks of whether a version is read
INITIAL_VERSION = -1  # version number of the weights in the model folder


def make_engine(config: RunConfig, model_dir: str, worker_name: str) -> VllmEngine:
    return VllmEngine(config, model_dir, worker_name)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Command:
    """Work for the stepping thread, which calls `run`. An error that is not in `survives` ends it."""

    run: Callable[[], Any]
    answer: asyncio.Future[Any] | None = None
    survives: tuple[type[Exception], ...] = (Exception,)


class VllmEngine(Engine):
    """Generation `Engine` that runs `vllm.LLMEngine`, on CPU and on GPUs."""

    def __init__(self, config: RunConfig, model_dir: str, worker_name: str) -> None:
        self._arguments = engine_arguments(config, model_dir, worker_name)
        self._model_dir = model_dir
        self._int8 = config.generation.quantization == INT8
        self._draft = config.generation.draft_folder
        self._hold_base = config.weights.format != "full"
        self._name = worker_name
        self._recompute = config.generation.cache_on_update == "recompute"
        self._salted = config.generation.cache_on_update == "salt"
        self._start_timeout_s = config.run.start_timeout_s
        self._take_deadline_s = config.generation.take_deadline_s
        self._serves = config.generation.lora == "served"
        self._adapters: Adapters
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._lock = threading.Lock()  # guards _failure and the decision to queue a command
        self._failure: RlhfError | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._llm: LLMEngine
        self._scheduler: Any  # read by `stats`; vLLM's own metrics would take time in every step
        self._requests: Requests
        self._updating = asyncio.Lock()
        # used by the stepping thread only
        self._closing = False
        self._num_steps = 0
        self._version = INITIAL_VERSION

    async def start(self) -> None:
        """Import vLLM and load the model. Raises `WorkerError`, `ConfigError`, `StalledError`."""
        self._loop = asyncio.get_running_loop()
        started = self._loop.create_future()
        self._thread = threading.Thread(
            target=self._run, args=(started,), name=f"engine-{self._name}", daemon=True
        )
        self._thread.start()
        try:
            async with asyncio.timeout(self._start_timeout_s):
                await started
        except TimeoutError:
            raise StalledError(
                f"{self._name}: vLLM was not up after run.start_timeout_s = "
                f"{self._start_timeout_s:g} s"
            ) from None

    async def generate(self, request: Request) -> list[Sample]:
        """Sample all responses of one request.

        Raises: `DataError` if vLLM refuses the request, `WorkerError` if the engine is dead.
        Waits for: the last sample of the request. Unblocked by: steps, failure, close.
        """
        answer: asyncio.Future[list[Sample]] = self._loop.create_future()
        self._post(_Command(run=lambda: self._requests.add(request, answer), answer=answer))
        try:
            return await answer
        except asyncio.CancelledError:
            if self._failure is None:
                self._post(_Command(run=lambda: self._requests.abort(request.request_id)))
            raise

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        """Stage `version`, then swap it in between two steps. One update at a time."""
        number = version.version
        whole_s = self._take_deadline_s(version.num_bytes)
        deadline = Deadline(f"{self._name}: reading version {number}", _READ_SHARE * whole_s)
        if self._serves:
            async with self._updating:
                self.check()
                return await self._load_adapter(version, deadline, _HANG_SHARE * whole_s)
        stage = {
            "version": number,
            "path": version.path,
            "digest": version.digest,
            "deadline": deadline,
        }
        async with self._updating:
            self.check()
            reports = await self._stage(stage, _HANG_SHARE * whole_s)
            staged = _require_equal_reports(reports, version)
            pause_s = await self._call(lambda: self._apply(version.version), survives=())
        return LoadedWeights(
            version=version.version,
            digest=staged["digest"],
            num_tensors=staged["num_tensors"],
            pause_s=pause_s,
        )

    async def _load_adapter(
        self, version: WeightVersion, deadline: Deadline, limit_s: float
    ) -> LoadedWeights:
        """Write the adapter of `version` while steps continue; new requests then sample with it.

        Raises: `WeightError` after `limit_s`; the old adapter keeps serving.
        Waits for: the storage, at most `limit_s`.
        """
        stop_s = _STOP_SHARE * limit_s
        try:
            async with asyncio.timeout(limit_s):
                adapter = await read_beside(
                    lambda: self._adapters.write(version, deadline), deadline, stop_s
                )
        except (TimeoutError, StalledError) as error:
            raise WeightError(
                f"{self._name}: {version.path} did not answer for {limit_s:g} s while version "
                f"{version.version} was read ({error}). Look at that disk, or raise "
                "generation.pull_timeout_s"
            ) from error
        return adapter.loaded(
            await self._call(lambda: self._serve(adapter), survives=(WeightError,))
        )

    async def _stage(self, stage: dict[str, Any], limit_s: float) -> list[Any]:
        """Let all worker processes read a version, and return their reports.

        Each process reads in a thread while steps continue.

        Raises: `WeightError` if a read hangs in storage that does not answer. Nothing is replaced
        then, and the old weights keep serving.
        Waits for: those threads, at most `limit_s`, which is longer than they may read.
        """
        ended = False
        try:
            async with asyncio.timeout(limit_s):
                refusals = await self._call(lambda: self._rpc("begin_stage", stage))
                if any(refusals):
                    return [refusal for refusal in refusals if refusal]
                reports = [None]
                while None in reports:
                    await asyncio.sleep(_POLL_S)
                    reports = await self._call(lambda: self._rpc("stage_report"))
                ended = True
                return reports
        except TimeoutError:
            raise WeightError(
                f"{self._name}: {stage['path']} did not answer for {limit_s:g} s while version "
                f"{stage['version']} was read. Look at that disk, or raise generation.pull_timeout_s"
            ) from None
        finally:
            if not ended and self._failure is None:
                self._post(_Command(run=lambda: self._rpc("cancel_stage")))

    def stats(self) -> Mapping[str, float]:
        """Return numbers of sequences, the share of the KV cache in use, and totals since start."""
        num_running, num_waiting = self._scheduler.get_request_counts()
        totals = self._requests.totals
        return {
            "num_running": float(num_running),
            "num_waiting": float(num_waiting),
            "kv_cache_use_fraction": float(self._scheduler.get_kv_cache_usage()),
            "num_requests": float(len(self._requests)),
            "num_tokens_total": float(totals.num_sampled),
            "prefix_tokens_total": float(totals.num_prefix),
            "prefix_hit_tokens_total": float(totals.num_cached),
            "draft_tokens_total": float(totals.num_drafted),
            "draft_accepted_tokens_total": float(totals.num_accepted),
            "num_steps_total": float(self._num_steps),
        }

    def check(self) -> None:
        if self._failure is not None:
            raise _again(self._failure)
        if self._thread is None or not self._thread.is_alive():
            raise WorkerError(f"{self._name}: the engine is not running; call start first")

    async def close(self) -> None:
        """Stop the stepping thread and shut vLLM down.

        Raises: `StalledError` if that takes longer than `_CLOSE_TIMEOUT_S`.
        Waits for: the current step, then vLLM's shutdown.
        """
        if self._thread is None:
            return
        self._commands.put(_Command(run=self._stop))
        await run_in_thread(self._thread.join, _CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            raise StalledError(
                f"{self._name}: the stepping thread still runs {_CLOSE_TIMEOUT_S:g} s after close; "
                "end the process"
            )

    # From the event loop to the stepping thread.

    async def _call(
        self, run: Callable[[], Any], survives: tuple[type[Exception], ...] = (Exception,)
    ) -> Any:
        answer = self._loop.create_future()
        self._post(
            _Command(run=lambda: self._deliver([(answer, run())]), answer=answer, survives=survives)
        )
        return await answer

    def _post(self, command: _Command) -> None:
        with self._lock:  # held for a queue operation only, never while waiting
            self.check()
            self._commands.put(command)

    # On the stepping thread.

    def _run(self, started: asyncio.Future[None]) -> None:
        """Build the engine, then run commands and steps until `close` or a failure.

        Waits for: a command, when idle. Unblocked by: any call above, including `close`.
        """
        cause: Exception | None = None
        try:
            self._build()
            self._deliver([(started, None)])
            while not self._closing:
                self._run_commands(wait=not self._llm.has_unfinished_requests())
                if self._llm.has_unfinished_requests() and not self._closing:
                    self._deliver(self._requests.collect(self._llm.step()))
                    self._num_steps += 1
                    if self._serves:
                        self._adapters.retire(self._llm, self._requests.adapters_used)
        except Exception as error:
            cause = error
        finally:
            self._end(cause, started)

    def _build(self) -> None:
        probe_vllm()
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        refuse_unknown_arguments(self._arguments, EngineArgs)
        if self._int8:
            write_start_folder(self._model_dir, self._arguments["model"])

        self._llm = LLMEngine.from_engine_args(EngineArgs(**self._arguments))
        self._scheduler = self._llm.engine_core.engine_core.scheduler  # type: ignore[attr-defined]
        self._llm.set_weight_version(str(INITIAL_VERSION))
        self._requests = Requests(
            self._llm, self._scheduler, self._salted, INITIAL_VERSION, self._serves
        )
        if self._serves:
            self._adapters = Adapters(self._model_dir, self._name)
            return
        store = {
            "checkpoint": self._model_dir,
            "draft": self._draft,
            "hold_base": self._hold_base,
            "int8": self._int8,
        }
        self._rpc("init_weight_transfer_engine", {"init_info": store})

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
                fatal = command.answer is None or not isinstance(error, command.survives)
                if command.answer is not None:
                    self._deliver([(command.answer, self._to_failure(error, fatal))])
                if fatal:
                    raise

    def _apply(self, version: int) -> float:
        started = time.perf_counter()
        for draft in (False, True) if self._draft else (False,):
            self._rpc("start_draft_weight_update" if draft else "start_weight_update")
            self._rpc("update_weights", {"update_info": {"version": version, "draft": draft}})
            self._rpc("finish_weight_update")
        if self._recompute or version <= self._version:
            self._llm.reset_prefix_cache(reset_running_requests=True)
        self._llm.set_weight_version(str(version))
        self._deliver(self._requests.follow(version))
        self._version = version
        return time.perf_counter() - started

    def _serve(self, adapter: Adapter) -> float:
        started = time.perf_counter()
        self._adapters.add(self._llm, adapter)
        self._deliver(self._requests.follow(adapter.version, adapter))
        self._adapters.retire(self._llm, self._requests.adapters_used)
        self._version = adapter.version
        return time.perf_counter() - started

    def _rpc(self, method: str, kwargs: dict[str, Any] | None = None) -> list[Any]:
        return self._llm.collective_rpc(method, kwargs=kwargs or {})

    def _stop(self) -> None:
        self._closing = True

    def _deliver(self, answers: list[Answer]) -> None:
        if answers and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_settle, answers)

    def _to_failure(self, error: Exception, fatal: bool) -> RlhfError:
        """Wrap an error of vLLM, and any that is fatal, in a `WorkerError` that names the worker."""
        if isinstance(error, RlhfError) and not fatal:
            return error
        failure = WorkerError(f"{self._name}: vLLM failed: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    def _end(self, cause: Exception | None, started: asyncio.Future[None]) -> None:
        """Mark the engine dead, answer every waiting call with the failure, and shut vLLM down."""
        if cause is None:
            failure: RlhfError = WorkerError(f"{self._name}: the engine is closed")
        else:
            failure = self._to_failure(cause, fatal=not self._is_refusal(cause))
        with self._lock:
            self._failure = failure
        orphans: list[asyncio.Future[Any]] = [started]
        if hasattr(self, "_requests"):
            orphans += self._requests.drop_all()
        while not self._commands.empty():
            answer = self._commands.get_nowait().answer
            orphans += [answer] if answer is not None else []
        self._deliver([(answer, _again(failure)) for answer in orphans])
        if hasattr(self, "_llm"):
            self._llm.engine_core.shutdown()
        if hasattr(self, "_adapters"):
            self._adapters.close()

    def _is_refusal(self, cause: Exception) -> bool:
        """Whether this project refused to start, as opposed to a failure inside vLLM."""
        return isinstance(cause, RlhfError) and not hasattr(self, "_llm")


def _again(failure: RlhfError) -> RlhfError:
    """Copy an error to raise it: one instance raised many times would collect all tracebacks."""
    copy = type(failure)(str(failure))
    copy.__cause__ = failure.__cause__
    return copy


def _settle(answers: list[Answer]) -> None:
    for answer, result in answers:
        if answer.done():  # cancelled in the meantime
            continue
        if isinstance(result, Exception):
            answer.set_exception(result)
        else:
            answer.set_result(result)


def _require_equal_reports(reports: list[dict[str, Any]], version: WeightVersion) -> dict[str, Any]:
    """Return the report that all processes of a tensor-parallel worker agree on, or `WeightError`."""
    for report in reports:
        if "error" in report:
            raise WeightError(f"version {version.version} was not loaded: {report['error']}")
    if any(report != reports[0] for report in reports):
        raise WeightError(
            f"version {version.version} was not loaded: the parts of the worker read different "
            f"contents: {reports}. Check that all of them see the same {version.path}"
        )
    return reports[0]
