"""A tensor-parallel engine, real and on the CPU: its parts are processes, and any of them may die."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf_cluster.errors import WeightError, WorkerError
from tests.chaos.monkey import engine_children
from tests.chaos.processes import Process, of_pid
from tests.support.builders import tiny_llama
from tests.support.builders.engine_models import (
    MAX_RESPONSE,
    TOLERANCE,
    Models,
    build_models,
    engine_config,
    make_request,
    until,
    worst,
)
from tests.support.engines import engine_process

GONE_WITHIN_S = 120.0

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("model"))


@pytest.fixture
def engine(models: Models) -> Iterator[engine_process.EngineProcess]:
    config = engine_config(generation={"tensor_parallel_size": 2})
    process = engine_process.EngineProcess(config, str(models.folder))
    yield process
    process.kill()


def parts_of(engine: engine_process.EngineProcess) -> list[Process]:
    parent = of_pid(engine.pid)
    assert parent is not None
    return engine_children([parent])


def let_reads_hang(version: Path) -> None:
    """To open its shards takes a writer from now on."""
    for shard in list(version.glob("*.safetensors")):
        shard.unlink()
        os.mkfifo(shard)


def gone(processes: list[Process]) -> bool:
    """Waits for: their end, at most `GONE_WITHIN_S`."""
    deadline = time.monotonic() + GONE_WITHIN_S
    while (alive := any(p.alive() for p in processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not alive


async def test_a_part_that_is_killed_fails_every_call_and_leaves_no_other(engine, models, tmp_path):
    version = tiny_llama.publish(tmp_path, 1, tiny_llama.checkpoint_tensors(models.second))
    await engine.load_weights(version)
    request = make_request("whole", max_tokens=16)
    [sample] = await engine.generate(request)
    assert worst(models.second, request, sample) < TOLERANCE
    parts = parts_of(engine)
    assert len(parts) == 2
    long = make_request("cut", max_tokens=MAX_RESPONSE, num_samples=16)
    pending = asyncio.create_task(engine.generate(long))
    await until(engine, lambda stats: stats["num_running"] > 0)
    os.kill(parts[1].pid, signal.SIGKILL)
    with pytest.raises(WorkerError):
        await pending
    with pytest.raises(WorkerError):
        await engine.check()
    assert gone(parts)


async def test_a_storage_that_hangs_under_all_parts_stops_no_request_and_costs_no_weights(
    models, tmp_path
):
    config = engine_config(
        generation={"tensor_parallel_size": 2, "pull_timeout_s": 6.0}, weights={"format": "full"}
    )
    process = engine_process.EngineProcess(config, str(models.folder))
    try:
        first = tiny_llama.publish(tmp_path, 1, tiny_llama.checkpoint_tensors(models.second))
        await process.load_weights(first)
        hanging = tiny_llama.publish(tmp_path, 2, tiny_llama.checkpoint_tensors(models.first))
        let_reads_hang(Path(hanging.path))
        pull = asyncio.create_task(process.load_weights(hanging))
        for number in range(3):
            request = make_request(f"beside-{number}", max_tokens=16)
            [sample] = await process.generate(request)
            assert worst(models.second, request, sample) < TOLERANCE
        assert not pull.done()
        with pytest.raises(WeightError, match="did not answer"):
            await pull
        with pytest.raises(WeightError, match="still being read"):
            await process.load_weights(hanging)
        await process.check()
        request = make_request("after", max_tokens=16)
        [sample] = await process.generate(request)
        assert worst(models.second, request, sample) < TOLERANCE
    finally:
        process.kill()


def test_the_parts_of_an_engine_that_is_killed_end_by_themselves(
    engine: engine_process.EngineProcess,
):
    parts = parts_of(engine)
    assert len(parts) == 2
    os.kill(engine.pid, signal.SIGKILL)
    assert gone(parts)
