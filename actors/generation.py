"""One generation worker: an inference engine, turned into a source of validated rollouts.

    ticket, prompt  -->  generate  -->  RolloutGroup      pull(version)  -->  live weights

Promises:
- a plain class: no ray here; every public method is async and none blocks the event loop;
- token ids, log-probabilities and versions are the engine's own, checked when the record is built;
- the random stream of a group follows from run seed and group id alone: a group that is issued
  again is the same group whichever worker takes it, and no two groups share a stream;
- a version counts as live only after the engine reported the digest and tensor count that were
  published; requests go on while it is pulled.
"""

from __future__ import annotations

import asyncio
import importlib
import itertools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from actors.engine import Engine, LoadedWeights, Request, Sample
from actors.vllm_arguments import stable_hash
from rlhf_cluster.config import RunConfig
from rlhf_cluster.errors import ConfigError, StalledError, WeightError, WorkerError
from rlhf_cluster.records import (
    FinishReason,
    Prompt,
    Rollout,
    RolloutGroup,
    Sampling,
    Ticket,
    WeightVersion,
)

DEFAULT_ENGINE = "actors.vllm_engine:make_engine"


class GenerationWorker:
    """Serves one engine. Call `start` first; `close` when done."""

    def __init__(
        self,
        config: RunConfig,
        model_dir: str,
        name: str,
        engine_factory: str = DEFAULT_ENGINE,
    ) -> None:
        """`engine_factory` is "module:callable", called with (config, model_dir, worker name)."""
        self._config = config
        self._model_dir = model_dir
        self._name = name
        self._engine_factory = engine_factory
        self._engine: Engine | None = None
        self._loaded: LoadedWeights | None = None
        self._request_numbers = itertools.count()
        self._num_in_flight = 0
        self._totals = {"num_groups": 0.0, "num_tokens": 0.0, "num_pulls": 0.0, "pull_pause_s": 0.0}

    async def start(self) -> dict[str, float]:
        """Load the model; returns how long it took. Raises what the engine raises."""
        started = time.perf_counter()
        factory = _resolve(self._engine_factory)
        engine: Engine = factory(self._config, self._model_dir, self._name)
        await engine.start()
        self._engine = engine
        return {"start_s": time.perf_counter() - started}

    async def generate(
        self, ticket: Ticket, prompt: Prompt, sampling: Sampling
    ) -> tuple[dict[str, Any], RolloutGroup]:
        """Sample one group. The first value is a small description of the second.

        Waits for: the last sample. Raises `StalledError` after `generation.request_timeout_s`,
        `WorkerError` when the engine is dead, `RecordError` when its answer is inconsistent.
        """
        engine = self._running_engine()
        request = Request(
            request_id=f"{ticket.group_id}-{next(self._request_numbers)}",
            prompt_ids=prompt.token_ids.tolist(),
            num_samples=sampling.num_samples,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            seed=group_seed(self._config.run.seed, ticket.group_id),
        )
        timeout_s = self._config.generation.request_timeout_s
        started_s, clock = time.time(), time.perf_counter()
        self._num_in_flight += 1
        try:
            async with asyncio.timeout(timeout_s):
                samples = await engine.generate(request)
        except TimeoutError:
            raise StalledError(
                f"{self._name}: group {ticket.group_id} was not sampled after "
                f"generation.request_timeout_s = {timeout_s:g} s"
            ) from None
        finally:
            self._num_in_flight -= 1
        generate_s = time.perf_counter() - clock
        group = self._to_group(
            ticket, prompt, sampling, samples, (started_s, started_s + generate_s)
        )
        num_tokens = sum(len(rollout.response_ids) for rollout in group.rollouts)
        self._totals["num_groups"] += 1
        self._totals["num_tokens"] += num_tokens
        meta = {
            "group_id": ticket.group_id,
            "worker": self._name,
            "num_tokens": num_tokens,
            "generate_s": generate_s,
        }
        return meta, group

    async def pull(self, version: WeightVersion) -> LoadedWeights:
        """Make `version` live, while requests go on.

        Raises `WeightError` when it cannot be read or is not what was published, `StalledError`
        after `generation.pull_timeout_s`.
        """
        engine, timeout_s = self._running_engine(), self._config.generation.pull_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                loaded = await engine.load_weights(version)
        except TimeoutError:
            raise StalledError(
                f"{self._name}: version {version.version} was not live after "
                f"generation.pull_timeout_s = {timeout_s:g} s"
            ) from None
        for field in ("version", "digest", "num_tensors"):
            expected, found = getattr(version, field), getattr(loaded, field)
            if found != expected:
                raise WeightError(
                    f"{self._name}: the engine loaded {field} {found}, version {version.version} "
                    f"was published with {expected}. Pull it again, or restart the worker"
                )
        self._loaded = loaded
        self._totals["num_pulls"] += 1
        self._totals["pull_pause_s"] += loaded.pause_s
        return loaded

    async def health(self) -> dict[str, Any]:
        """What this worker serves. Raises `WorkerError` when it can no longer serve."""
        self._running_engine().check()
        return {
            "worker": self._name,
            "version": self._loaded.version if self._loaded else None,
            "digest": self._loaded.digest if self._loaded else None,
            "num_in_flight": self._num_in_flight,
        }

    async def stats(self) -> dict[str, float]:
        """The engine's numbers under `engine/`, this worker's own under `worker/`."""
        engine = {f"engine/{key}": value for key, value in self._running_engine().stats().items()}
        totals = {f"worker/{key}_total": value for key, value in self._totals.items()}
        return engine | totals | {"worker/num_in_flight": float(self._num_in_flight)}

    async def close(self) -> None:
        if self._engine is not None:
            await self._engine.close()
            self._engine = None

    def _running_engine(self) -> Engine:
        if self._engine is None:
            raise WorkerError(f"{self._name}: no engine is running; call start first")
        return self._engine

    def _to_group(
        self,
        ticket: Ticket,
        prompt: Prompt,
        sampling: Sampling,
        samples: list[Sample],
        times_s: tuple[float, float],
    ) -> RolloutGroup:
        if len(samples) != sampling.num_samples:
            raise WorkerError(
                f"{self._name}: group {ticket.group_id} came back with {len(samples)} samples, "
                f"{sampling.num_samples} were asked for"
            )
        rollouts = tuple(
            Rollout(
                rollout_id=f"{ticket.group_id}/{index}",
                prompt_id=prompt.prompt_id,
                prompt_ids=prompt.token_ids,
                response_ids=np.asarray(sample.token_ids, dtype=np.int32),
                sampled_logprobs=np.asarray(sample.logprobs, dtype=np.float32),
                versions=expand_spans(sample.version_spans, len(sample.token_ids)),
                response_mask=np.ones(len(sample.token_ids), dtype=np.bool_),
                finish_reason=FinishReason(sample.finish_reason),
                temperature=sampling.temperature,
                worker=self._name,
                started_s=times_s[0],
                finished_s=times_s[1],
            )
            for index, sample in enumerate(samples)
        )
        return RolloutGroup(ticket=ticket, prompt=prompt, rollouts=rollouts)


def group_seed(run_seed: int, group_id: str) -> int:
    """The 63-bit seed of a group's random stream."""
    return stable_hash(f"{run_seed}/{group_id}", bits=63)


def expand_spans(spans: list[tuple[int, int, int]], num_tokens: int) -> np.ndarray:
    """One version a token, [num_tokens] int32. Raises `WorkerError` unless spans tile them."""
    edges = [0] + [end for _, _, end in spans]
    lengths = np.diff(edges)
    starts = [start for _, start, _ in spans]
    if edges[-1] != num_tokens or starts != edges[:-1] or (lengths <= 0).any():
        raise WorkerError(f"version spans {spans} do not tile {num_tokens} response tokens")
    versions = [version for version, _, _ in spans]
    return np.repeat(np.asarray(versions, dtype=np.int32), lengths)


def _resolve(path: str) -> Callable[..., Engine]:
    module_name, colon, name = path.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), name) if colon else None
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"engine_factory {path!r} cannot be imported: {error}") from error
    if not callable(factory):
        raise ConfigError(f"engine_factory {path!r}: expected 'module:callable'")
    return factory
