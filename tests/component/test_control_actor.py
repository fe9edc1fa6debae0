"""A scale request outlives its control actor, which is killed or stopped on a real Ray cluster."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest
import ray

from actors.services import control_actor
from rlhf_cluster.util.slow_disk import run_in_thread
from tests.support.builders.run_configs import tiny_config

SIZES, RESULTS = {"generation": 2}, {"generation": "generation: 2 workers"}


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_request_whose_actor_ends_is_carried_out_once_and_answered(
    ray_address: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(control_actor, "CALL_TIMEOUT_S", 3.0)
    run = f"ends-by-{number}"
    told: list[str] = []
    config = tiny_config(run={"name": run}, cluster={"max_restarts": 100})
    channel = control_actor.open_channel(config, 0.0, told.append)
    try:
        async with asyncio.timeout(200):
            assert await channel.exchange() == []
            asked = asyncio.create_task(
                run_in_thread(control_actor.scale, Path(run), SIZES, ray_address)
            )
            while not (wishes := await channel.exchange()):
                pass
            [wish] = wishes
            assert wish.sizes == SIZES
            actor = control_actor.find(run, ray_address)
            os.kill(ray.get(actor.__ray_call__.remote(lambda _: os.getpid()), timeout=60), number)
            channel.answer(wish, RESULTS)
            while not asked.done() or not channel.restarts.total:
                assert await channel.exchange() == [], "it is not carried out again"
            assert asked.result() == RESULTS
        assert channel.is_open
        assert "another control channel is open, restart 1 of 100" in told[0]
    finally:
        channel.close()
