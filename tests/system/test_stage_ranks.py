"""Offline stages on several ranks: what is trained depends neither on their number nor the backend."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.builders.offline_stages import (
    random_units,
    stage_config,
)
from tests.support.builders.tiny_learner import (
    full_parameters,
    save_llama,
)
from tests.support.processes.rank_processes import run_ranks

STEPS = 3
LEARNERS: dict[str, dict[str, Any]] = {
    "fsdp2": {},
    "zero3": {"backend": "zero3"},
    "short rows": {"tokens_per_row": 24, "tokens_per_micro_batch": 24},
}


def train(rank: int, world_size: int, address: str | None, job: Any) -> Any:
    """Losses, held-out loss and whole parameters after some steps on batches of unequal units."""
    from rlhf_cluster.learner.offline_rank import StageRank

    model_dir, learner = job
    config = stage_config(
        model_dir,
        run={"start_timeout_s": 120.0},
        data={"max_tokens": 16},
        learner={"ranks": world_size, "collective_timeout_s": 120.0, **learner},
    )
    stage = StageRank(config, model_dir, rank, world_size, address, num_steps=STEPS)
    stage.setup()
    try:
        losses = [stage.train(random_units(5, seed=i)).metrics["stage/loss"] for i in range(STEPS)]
        held_out = stage.evaluate(random_units(3, seed=9))
        scored = stage.logprobs(random_units(3, seed=9))
        weights = {n: w.numpy() for n, w in full_parameters(stage.model.module).items()}
    finally:
        stage.close()
    return losses, held_out["sft/loss"], [v for found in scored for v in found], weights


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, list[Any]]]:
    model_dir = save_llama(tmp_path_factory.mktemp("model") / "llama")
    jobs = {name: (model_dir, learner) for name, learner in LEARNERS.items()}
    one = {name: job for name, job in jobs.items() if name != "zero3"}  # it needs processes
    return {1: run_ranks(train, 1, one), 2: run_ranks(train, 2, jobs)}


@pytest.mark.parametrize("name", LEARNERS)
def test_two_ranks_train_what_one_does(results: dict[int, Any], name: str) -> None:
    [(losses, held_out, scored, weights)] = results[1]["fsdp2"]
    first, second = results[2][name]
    for found in (first, second):
        assert found[0] == pytest.approx(losses, abs=1e-5)
        assert found[1] == pytest.approx(held_out, abs=1e-5)
        for values, expected in zip(found[2], scored, strict=True):
            np.testing.assert_allclose(values, expected, atol=1e-4)
        for key, weight in weights.items():
            np.testing.assert_allclose(found[3][key], weight, atol=5e-5, err_msg=key)
