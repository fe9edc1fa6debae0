"""A `VllmEngine` in a process of its own, called from any event loop of the test process.

vLLM needs its environment before it is imported and takes `torch.set_num_threads` away, so the
process that runs the tests never imports it.
"""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import os
import threading
import traceback
from concurrent.futures import Future
from multiprocessing.connection import Connection
from typing import Any

from rlhf_cluster.config import RunConfig
from rlhf_cluster.generation.engine import (
    LoadedWeights,
    Request,
    Sample,
)
from rlhf_cluster.records import WeightVersion

_START_TIMEOUT_S = 180.0
_CALL_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 30.0
NUM_DRAFT_TOKENS = 3


class EngineProcess:
    """Starts the engine. Calls run side by side; cancelling `generate` cancels it over there."""

    def __init__(self, config: RunConfig, model_dir: str, draft: str | None = None) -> None:
        """`draft`: folder of a model that proposes tokens. The product refuses one on CPU."""
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # One that is a daemon may have no children, which the parts of a parallel engine are.
        alone = config.generation.tensor_parallel_size == 1
        self._process = context.Process(
            target=_serve, args=(theirs, config, model_dir, draft), daemon=alone
        )
        self._numbers = itertools.count(1)
        self._answers: dict[int, Future[Any]] = {0: Future()}
        self._process.start()
        theirs.close()
        threading.Thread(target=self._read, daemon=True).start()
        try:
            self._answers[0].result(_START_TIMEOUT_S)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        """Waits for: its end, which nothing can hold up."""
        self._process.kill()
        self._process.join(_END_TIMEOUT_S)

    async def generate(self, request: Request) -> list[Sample]:
        return await self._call("generate", request)

    async def load_weights(self, version: WeightVersion) -> LoadedWeights:
        return await self._call("load_weights", version)

    async def stats(self) -> dict[str, float]:
        return await self._call("stats")

    async def check(self) -> None:
        await self._call("check")

    async def generate_counted(self, request: Request) -> tuple[list[Sample], int]:
        """The samples, and how many prompt tokens of the last one came from the prefix cache."""
        return await self._call("generate_counted", request)

    async def break_step(self) -> None:
        """The next step of the engine raises."""
        await self._call("break_step")

    async def time_generation(self, requests: list[Request]) -> float:
        """Seconds to answer all requests, measured over there."""
        return await self._call("time_generation", requests)

    def close(self) -> None:
        self._connection.send((0, "quit", ()))
        self._process.join(_END_TIMEOUT_S)
        assert not self._process.is_alive(), "the engine process did not end after close"

    async def _call(self, method: str, *arguments: Any) -> Any:
        number, answer = next(self._numbers), Future()
        self._answers[number] = answer
        self._connection.send((number, method, arguments))
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await asyncio.wrap_future(answer)
        except asyncio.CancelledError:
            self._connection.send((number, "cancel", ()))
            raise

    def _read(self) -> None:
        """Waits for: answers. Unblocked by: the end of the engine process."""
        while True:
            try:
                number, result = self._connection.recv()
            except (EOFError, OSError):
                for answer in list(self._answers.values()):
                    if not answer.done():
                        answer.set_exception(RuntimeError("the engine process ended"))
                return
            answer = self._answers.pop(number)
            if answer.cancelled():
                continue
            if isinstance(result, BaseException):
                answer.set_exception(result)
            else:
                answer.set_result(result)


def _serve(connection: Connection, config: RunConfig, model_dir: str, draft: str | None) -> None:
    from actors.vllm.vllm_engine import engine_environment

    os.environ.update(engine_environment(on_gpu=config.generation.num_gpus > 0))
    asyncio.run(_Server(connection).run(config, model_dir, draft))


class _Server:
    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._num_cached: dict[str, int] = {}

    async def run(self, config: RunConfig, model_dir: str, draft: str | None) -> None:
        from actors.vllm.vllm_engine import make_engine

        self._engine = make_engine(config, model_dir, "test-worker")
        if draft is not None:
            self._engine._draft = draft
            self._engine._arguments["speculative_config"] = {
                "method": "draft_model",
                "model": draft,
                "num_speculative_tokens": NUM_DRAFT_TOKENS,
            }
            self._engine._arguments["per_request_spec_decode_metrics"] = "summary"
        await self._answer(0, self._engine.start())
        while True:
            number, method, arguments = await asyncio.to_thread(self._connection.recv)
            if method == "quit":
                break
            if method == "cancel":
                self._tasks[number].cancel()
                continue
            call = getattr(self, f"_{method}")(*arguments)
            self._tasks[number] = asyncio.create_task(self._answer(number, call))
        await self._engine.close()

    async def _answer(self, number: int, call: Any) -> None:
        try:
            result = await call
        except asyncio.CancelledError:
            result = RuntimeError("cancelled")
        except Exception as error:
            traceback.print_exc()
            result = error
        self._connection.send((number, result))

    async def _generate(self, request: Request) -> list[Sample]:
        return await self._engine.generate(request)

    async def _generate_counted(self, request: Request) -> tuple[list[Sample], int]:
        requests = self._engine._requests
        collect = type(requests).collect

        def count_and_collect(outputs: Any) -> Any:
            self._num_cached |= {output.request_id: output.num_cached_tokens for output in outputs}
            return collect(requests, outputs)

        requests.collect = count_and_collect
        samples = await self._engine.generate(request)
        return samples, self._num_cached.pop(request.request_id)

    async def _load_weights(self, version: WeightVersion) -> LoadedWeights:
        return await self._engine.load_weights(version)

    async def _stats(self) -> dict[str, float]:
        return dict(self._engine.stats())

    async def _check(self) -> None:
        self._engine.check()

    async def _break_step(self) -> None:
        def step() -> None:
            raise ArithmeticError("a step went wrong")

        self._engine._llm.step = step

    async def _time_generation(self, requests: list[Request]) -> float:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await asyncio.gather(*[self._engine.generate(request) for request in requests])
        return loop.time() - started
