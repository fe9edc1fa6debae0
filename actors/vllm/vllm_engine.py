"""vLLM as the engine of a generation worker: one engine in this process, stepped by one thread.

    event loop                              stepping thread
    generate, load_weights, close  --command-->  between two steps
    futures                        <--answers--  after a step

Promises:
- only the stepping thread touches vLLM (reading a version from disk on a single worker aside, which
  goes on beside sampling);
- commands run between steps, so a weight update never meets a half-done step, and every token is
  labelled with the version that sampled it;
- an update keeps all requests, and their caches as `generation.cache_on_update` says: "recompute"
  computes them again with the new weights, so that every later token depends on one version only;
  with "salt" and "keep" a running request goes on from what the old weights computed, and with
  "salt" no request starts from it (`actors.vllm.vllm_requests`); a version that is not newer, as after
  the loss of a learner, drops all caches: they may stand under its number with other weights;
- where `generation.lora` is "served", an update adds an adapter and replaces nothing: requests that
  have had a step go on with theirs, all others take the new one (`actors.vllm.vllm_adapters`);
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
from rlhf_cluster.util.slow_disk import aside
from rlhf_cluster.weights.formats.int8 import write_start_folder
from rlhf_cluster.weights.transports.transport import (
    Deadline,
)

if TYPE_CHECKING:
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VllmEngine", "engine_environment", "make_engine"]

_CLOSE_TIMEOUT_S = 30.0
_READ_SHARE = 0.8  # of the deadline of a pull; the rest is for the swap and for the answer
_HANG_SHARE = 0.85  # of it, after which a read that looks at no deadline is given up
_STOP_SHARE = 0.1  # of that, in which a read that looks at its deadline may end
_POLL_S = 0.02  # between two looks at whether a version is read
INITIAL_VERSION = -1  # of the weights in the model folder, before the first update


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
        self._lock = threading.Lock()  # over _failure and the decision to queue a command
        self._failure: RlhfError | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._llm: LLMEngine
        self._scheduler: Any  # read by `stats`; vLLM's own metrics would cost some of every step
        self._requests: Requests
        self._updating = asyncio.Lock()
        # The stepping thread's own.
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
        """Waits for: the last sample of the request. Unblocked by: steps, failure, close.

        Raises `DataError` when vLLM refuses the request, `WorkerError` when the engine is dead.
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
            reports = await self._staged(stage, _HANG_SHARE * whole_s)
            staged = _agreed(reports, version)
            pause_s = await self._call(lambda: self._apply(version.version), fatal=True)
        return LoadedWeights(
            version=version.version,
            digest=staged["digest"],
            num_tensors=staged["num_tensors"],
            pause_s=pause_s,
        )

    async def _load_adapter(
        self, version: WeightVersion, deadline: Deadline, limit_s: float
    ) -> LoadedWeights:
        """Write the adapter of `version` beside the steps, then let new requests sample with it.

        Waits for: the storage, `limit_s` at most. `WeightError` after that; the old one serves on.
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
        return adapter.loaded(await self._call(lambda: self._serve(adapter)))

    async def _staged(self, stage: dict[str, Any], limit_s: float) -> list[Any]:
        """The reports of all worker processes, each of which reads in a thread while steps go on.

        Waits for: those threads, a margin longer than they may read. `WeightError` when one hangs in a
        storage that does not answer: nothing is replaced by then, and the old weights go on to serve.
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
        """Sequences sampled and queued, share of the KV cache in use, and totals since start."""
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
        """Waits for: the step under way, then vLLM's shutdown. `StalledError` if it hangs."""
        if self._thread is None:
            return
        self._commands.put(_Command(run=self._stop))
        await aside(self._thread.join, _CLOSE_TIMEOUT_S)
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
                if command.answer is not None:
                    self._deliver([(command.answer, self._named(error, command.fatal))])
                if command.fatal or command.answer is None:
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
        self._requests.follow(version)
        self._version = version
        return time.perf_counter() - started

    def _serve(self, adapter: Adapter) -> float:
        started = time.perf_counter()
        self._adapters.add(self._llm, adapter)
        self._requests.follow(adapter.version, adapter)
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
