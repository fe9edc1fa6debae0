"""Logits that are not rounded to 16 bits, in the real engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import tiny_llama
from tests.support.builders.engine_models import (
    build_models,
    engine_config,
    expected_logprobs,
    make_request,
)
from tests.support.engines import engine_process

BOUND = 0.15  # nats, the mean of bfloat16 against float32; of other weights it is over 1

pytestmark = pytest.mark.timeout(600)


async def test_b9_an_engine_with_float32_logits_follows_new_weights(tmp_path: Path):
    """On a CPU it computes with another kernel, which must not keep a copy of the old weights."""
    models = build_models(tmp_path / "model")
    config = engine_config(generation={"dtype": "bfloat16"}, learner={"head_dtype": "float32"})
    engine = engine_process.EngineProcess(config, str(models.folder))
    try:
        for number, model in enumerate((models.first, models.second)):
            tensors = tiny_llama.checkpoint_tensors(model)
            await engine.load_weights(tiny_llama.publish(tmp_path / "weights", number, tensors))
            request = make_request(f"after-{number}", max_tokens=200)
            [sample] = await engine.generate(request)
            error = np.abs(np.asarray(sample.logprobs) - expected_logprobs(model, request, sample))
            assert error.mean() < BOUND
    finally:
        engine.kill()
