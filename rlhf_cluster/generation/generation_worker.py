"""One generation worker: an inference engine, turned into a source of validated rollouts.

    ticket, prompt  -->  generate  -->  RolloutGroup      pull(version)  -->  live weights
      PartialGroup  -->            -->  PartialGroup

Promises:
- It is a plain class and does not import ray. Every public method is async, and none blocks the event
  loop.
- Token ids, log-probabilities and versions come from the engine, and are checked when the record is
  built.
- A call that is issued again under the same weights returns the same tokens on any worker. No two
  groups, samples or segments share a random stream (`rlhf_cluster.generation.segments`).
- A version is live only after the engine reported the digest and tensor count that were published.
  Requests continue while it is pulled.
- A pull that breaks off, or ends with other weights than were published, fails the running requests
  and all later ones, until a complete version is loaded
  (`rlhf_cluster.generation.engine.WeightGuard`).
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, cast

from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import ConfigError, RecordError, StalledError, WeightError, WorkerError
from rlhf_cluster.generation import segments
from rlhf_cluster.generation.engine import (
    Engine,
    LoadedWeights,
    Sample,
    WeightGuard,
    read_beside,
)
from rlhf_cluster.records import (
    PartialGroup,
    Prompt,
    RolloutGroup,
    Sampling,
    Ticket,
    WeightVersion,
)
from rlhf_cluster.util.slow_disk import run_in_thread
from rlhf_cluster.weights.transports.node_mirror import Mirror
from rlhf_cluster.weights.transports.transport import Deadline

BRING_SHARE = 0.85  # share of a pull's seconds in which the mirror copies the version to the node
_STOP_SHARE = 0.05  # share of a pull's seconds in which a late thread may end
DEFAULT_ENGINE = "actors.vllm.vllm_engine:make_engine"


class GenerationWorker:
    """Worker that serves one engine. Call `start` first; `close` when done."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        name: str,
        engine_factory: str = DEFAULT_ENGINE,
        mirror: Mirror | None = None,
    ) -> None:
        """Set up the worker; `start` loads the model.

        `engine_factory` is "module:callable", called with (config, model_dir, worker name). With a
        `mirror`, versions are copied to this node before the engine reads them.
        """
        self._mirror = mirror
        self._config = config
        self._model_dir = model_dir
        self._name = name
        self._engine_factory = engine_factory
        self._engine: Engine | None = None
        self._loaded: LoadedWeights | None = None
        self._weights = WeightGuard(name)
        self._request_numbers = itertools.count()
        self._num_in_flight = 0
        self._totals = {"num_groups": 0.0, "num_tokens": 0.0, "num_pulls": 0.0, "pull_pause_s": 0.0}

    async def start(self) -> dict[str, float]:
        """Load the model. Returns the seconds that it took. Raises the engine's errors."""
        started = time.perf_counter()
        factory = _resolve(self._engine_factory)
        engine: Engine = factory(self._config, self._model_dir, self._name)
        await engine.start()
        self._engine = engine
        return {"start_s": time.perf_counter() - started}

    async def generate(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        partial: PartialGroup | None = None,
    ) -> tuple[dict[str, Any], RolloutGroup | PartialGroup]:
        """Sample one group, or its next segment after `partial`.

        Returns a small description of the result, and the result: a `RolloutGroup` once all responses
        of the group are finished, a `PartialGroup` before. Waits for: the last sample. Raises
        `StalledError` after `generation.request_timeout_s`, `WorkerError` when the engine is dead or
        its weights are lost, `RecordError` when its answer is inconsistent.
        """
        engine, mark = self._running_engine(), self._weights.check()
        section, seed = self._config.generation, self._config.run.seed
        timeout_s = section.request_timeout_s
        started_s, clock = time.time(), time.perf_counter()
        before = segments.begin(ticket, sampling, started_s) if partial is None else partial
        if before.group_id != ticket.group_id:
            raise RecordError(f"{ticket.group_id} cannot continue {before.group_id}")
        parts = segments.plan(
            before, prompt, sampling, section.segment_tokens, seed, self._request_numbers
        )
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(timeout_s):
                answers = await _all_or_none(engine.generate(p.request) for p in parts)
        except TimeoutError:
            raise StalledError(
                f"{self._name}: group {ticket.group_id} was not sampled after "
                f"generation.request_timeout_s = {timeout_s:g} s"
            ) from None
        finally:
            self._num_in_flight -= 1
        self._weights.check(mark)
        generate_s = time.perf_counter() - clock
        after = segments.extend(before, parts, answers, sampling, self._name)
        num_tokens = after.num_tokens - before.num_tokens
        meta = {
            "group_id": ticket.group_id,
            "worker": self._name,
            "num_tokens": num_tokens,
            "num_unfinished": after.num_unfinished,
            "generate_s": generate_s,
            "queued": engine.stats()["num_waiting"] > 0,
        }
        self._totals["num_tokens"] += num_tokens
        if after.num_unfinished:
            return meta, after
        self._totals["num_groups"] += 1
        return meta, segments.complete(after, ticket, prompt, sampling, started_s + generate_s)

    async def pull(self, version: WeightVersion) -> LoadedWeights:
        """Make `version` live, while requests continue.

        Raises `WeightError` when the version cannot be read or is not what was published,
        `StalledError` after its deadline (`RunConfig.pull_deadline_s`). If the engine refuses the
        version before it replaces anything, the old weights keep serving. Otherwise they are lost.
        """
        engine = self._running_engine()
        timeout_s = self._config.generation.take_deadline_s(version.num_bytes)
        version = await self._bring(version, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                loaded = await engine.load_weights(version)
        except WeightError:
            if self._mirror is not None:
                self._mirror.distrust(version.version)
            raise
        except BaseException as error:  # a cancelled call, too, may have replaced half of them
            self._weights.lose(f"pulling version {version.version}: {type(error).__name__} {error}")
            if not isinstance(error, TimeoutError):
                raise
            raise StalledError(
                f"{self._name}: version {version.version} of {version.path} was not live after "
                f"{timeout_s:g} s, its share of generation.pull_timeout_s = "
                f"{self._config.generation.pull_timeout_s:g} and of pull_bytes_per_s. Look at that "
                "disk and the engine, or raise it"
            ) from None
        for field in ("version", "digest", "num_tensors"):
            expected, found = getattr(version, field), getattr(loaded, field)
            if found != expected:
                mismatch = (
                    f"{self._name}: the engine loaded {field} {found}, version {version.version} "
                    f"was published with {expected}. Pull it again, or restart the worker"
                )
                self._weights.lose(mismatch)
                raise WeightError(mismatch)
        self._weights.restore()
        self._loaded = loaded
        self._totals["num_pulls"] += 1
        self._totals["pull_pause_s"] += loaded.pause_s
        return loaded

    async def _bring(self, version: WeightVersion, timeout_s: float) -> WeightVersion:
        """Return `version` with the path from which the engine reads it: the mirror's, if there is one.

        Waits for: the mirror. Raises `WeightError`: the mirror was too slow, and nothing is replaced.
        """
        if self._mirror is None:
            return version
        bring = self._mirror.bring
        what = f"{self._name}: bringing version {version.version} to this node"
        limit_s, stop_s = BRING_SHARE * timeout_s, _STOP_SHARE * timeout_s
        deadline = Deadline(what, limit_s)
        try:
            async with asyncio.timeout(limit_s + stop_s):
                return await read_beside(lambda: bring(version, deadline), deadline, stop_s)
        except TimeoutError as error:
            raise WeightError(
                f"{what} took longer than {limit_s:g} s. Look at {version.path} and the network, or "
                "raise generation.pull_timeout_s"
            ) from error

    async def health(self) -> dict[str, Any]:
        """Return the version that this worker serves. Raises `WorkerError` when it cannot serve."""
        self._running_engine().check()
        self._weights.check()
        return {
            "worker": self._name,
            "version": self._loaded.version if self._loaded else None,
            "digest": self._loaded.digest if self._loaded else None,
            "num_in_flight": self._num_in_flight,
        }

    async def stats(self) -> dict[str, float]:
        """Return the engine's numbers, prefix `engine/`, and this worker's, prefix `worker/`."""
        engine = {f"engine/{key}": value for key, value in self._running_engine().stats().items()}
        totals = {f"worker/{key}_total": value for key, value in self._totals.items()}
        return engine | totals | {"worker/num_in_flight": float(self._num_in_flight)}

    async def close(self) -> None:
        if self._mirror is not None:
            await run_in_thread(self._mirror.close)
        if self._engine is not None:
            await self._engine.close()
            self._engine = None

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise WorkerError(f"{self._name}: no engine is running; call start first")
        return self._engine


async def _all_or_none(calls: Iterable[Coroutine[Any, Any, list[Sample]]]) -> list[list[Sample]]:
    """Return every answer, in order. The first failure is raised, and cancels the other calls."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def _resolve(path: str) -> Callable[..., Engine]:
    module_name, colon, name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine_factory {path!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise ConfigError(f"engine_factory {path!r}: expected 'module:callable'")
    return cast("Callable[..., Engine]", factory)
