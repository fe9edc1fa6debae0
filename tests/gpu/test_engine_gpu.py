"""vLLM on a CUDA device: 8-bit weights that are replaced in flight."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.builders.engine_models import (
    ERRORS,
    Models,
    build_models,
    check_8_bit_update,
    engine_config,
)
from tests.support.engines import engine_process

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return build_models(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module", params=ERRORS)
def quantized(
    request: pytest.FixtureRequest, models: Models, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[engine_process.EngineProcess, tuple[float, float]]]:
    """An engine, and the bounds of its error."""
    config = engine_config(
        run={"root": str(tmp_path_factory.mktemp("runs"))},
        generation={"quantization": request.param, "dtype": "bfloat16", "num_gpus": 1},
    )
    process = engine_process.EngineProcess(config, str(models.folder))
    yield process, ERRORS[request.param]
    process.close()


async def test_s27_8_bit_weights_updated_in_flight_have_the_new_logprobs_and_lose_nothing(
    quantized: tuple[engine_process.EngineProcess, tuple[float, float]],
    models: Models,
    tmp_path: Path,
) -> None:
    engine, bounds = quantized
    await check_8_bit_update(engine, models, tmp_path, bounds)
