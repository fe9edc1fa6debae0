"""What a generation worker exports: of its engine, of the responses it makes, of its own process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.services.worker_actors import (
    ENGINE_GAUGES,
    ENGINE_TOTALS,
    GenerationActor,
)
from actors.vllm.vllm_engine import VllmEngine
from actors.vllm.vllm_requests import Totals
from rlhf_cluster.generation.generation_worker import GenerationWorker
from rlhf_cluster.observe.metrics import Metrics
from rlhf_cluster.records import Prompt, Sampling, Ticket
from tests.support.builders.run_configs import tiny_config
from tests.support.engines import scripted_engine
from tests.support.engines.scripted_engine import VOCABULARY
from tests.support.fakes.services import Sent

PROMPT = Prompt(
    prompt_id="p7",
    token_ids=np.array([VOCABULARY[c] for c in "503917="], dtype=np.int32),
    source="503917=",
)


class Worker(GenerationActor):
    """Without the log file, and with an engine whose numbers are given."""

    def __init__(self, model_dir: str) -> None:
        engine = "tests.support.engines.scripted_engine:make_engine"
        GenerationWorker.__init__(self, tiny_config(), model_dir, "generation-0", engine)
        self.sent, self.told = Sent(), dict[str, float]()
        self._metrics: Any = Metrics(self.sent)

    async def stats(self) -> dict[str, float]:
        return await super().stats() | self.told


@pytest.fixture
async def worker(tmp_path) -> Worker:
    scripted_engine.write_tokenizer(tmp_path)
    worker = Worker(str(tmp_path))
    await worker.start()
    return worker


async def test_totals_of_the_engine_are_exported_as_it_counts_them(worker):
    names = sorted(ENGINE_TOTALS.items())
    for total in (5.0, 12.0, 3.0):  # 3: an engine that started anew
        worker.told = {key: total + place for place, (key, _) in enumerate(names)}
        await worker.health()
    for place, (_, name) in enumerate(names):
        assert worker.sent.series[(name,)] == 12.0 + place + 3.0 + place


async def test_an_engine_without_caches_exports_none_of_it(worker):
    await worker.health()
    assert not {(name,) for name in ENGINE_TOTALS.values()} & worker.sent.series.keys()
    assert worker.sent.series[("generation/resident_bytes",)] > 1 << 20


@pytest.mark.parametrize(("max_tokens", "reason"), [(16, "stop"), (3, "length")])
async def test_responses_are_counted_by_why_they_ended(worker, max_tokens, reason):
    sampling = Sampling(num_samples=4, temperature=1.0, max_tokens=max_tokens)
    for number in range(2):
        await worker.generate(Ticket(number=number, version=0), PROMPT, sampling)
    found = {k[1]: v for k, v in worker.sent.series.items() if "responses_total" in k[0]}
    assert found == {reason: 8.0}


def test_vllms_engine_tells_what_is_exported_of_it(tmp_path):
    engine: Any = VllmEngine(tiny_config(), str(tmp_path), "generation-0")
    engine._scheduler = SimpleNamespace(
        get_request_counts=lambda: (2, 1), get_kv_cache_usage=lambda: 0.5
    )

    class Requests(list[str]):
        totals = Totals(num_sampled=9, num_prefix=8, num_cached=7, num_drafted=6, num_accepted=5)

    engine._requests = Requests()
    stats = engine.stats()
    exported = {name: stats[key.removeprefix("engine/")] for key, name in ENGINE_TOTALS.items()}
    assert exported == {
        "generation/prefix_tokens_total": 8.0,
        "generation/prefix_hit_tokens_total": 7.0,
        "generation/draft_tokens_total": 6.0,
        "generation/draft_accepted_tokens_total": 5.0,
    }
    assert {key.removeprefix("engine/") for key in ENGINE_GAUGES} <= stats.keys()
