"""One rank saves, and another one goes on as if there had been no interruption."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.errors import CheckpointError, RunError, WeightError
from rlhf_cluster.weights import store
from tests.support.builders.rank_checkpoints import (
    save,
    tensors,
    train,
)
from tests.support.builders.tiny_learner import (
    random_groups,
    sft_examples,
)

CASE: dict[str, dict[str, Any]] = {
    "algorithm": {
        "type": "grpo",
        "kl_coef": 0.1,
        "kl_control": {"type": "adaptive", "target": 1.0, "horizon": 16},
    },
    "scoring": {"reference": True, "rewards": [{"type": "exact_match", "normalize": "running"}]},
    "learner": {"learning_rate": 1e-3, "epochs": 2, "schedule": "cosine", "warmup_steps": 6},
}
"""State in every place: the KL controller, the scores seen, the schedule, optimizer steps of a step."""


def _comparable(metrics: dict[str, float]) -> dict[str, float]:
    return {k: v for k, v in metrics.items() if not k.endswith(("_s", "_bf16"))}


def test_s31_three_steps_saved_and_two_more_are_five_straight(
    start_learner: Any, tmp_path: Path
) -> None:
    straight = start_learner(**CASE)
    straight.sft_step(sft_examples())
    train(straight, 0, 3)
    folder, state = save(straight, tmp_path)
    saved = tensors(straight)
    metrics = train(straight, 3, 5)
    expected = tensors(straight)
    resumed = start_learner(**CASE)
    resumed.load_state(folder, state)
    for name, values in tensors(resumed).items():
        np.testing.assert_array_equal(values, saved[name], err_msg=name)
    assert resumed.version == 3
    assert list(map(_comparable, train(resumed, 3, 5))) == list(map(_comparable, metrics))
    found = tensors(resumed)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert {float(v[0]) for n, v in expected.items() if "/step/" in n} == {10.0}
    moved = [n for n in saved if not np.array_equal(saved[n], expected[n])]
    assert any("/exp_avg_sq/" in n for n in moved)


def test_a_copy_is_of_its_moment_however_late_it_is_written(
    start_learner: Any, tmp_path: Path
) -> None:
    learner = start_learner()
    train(learner, 0, 1)
    state, then = learner.copy_state(), tensors(learner)
    train(learner, 1, 2)
    report = learner.write_state(str(tmp_path))
    folder = store.commit(tmp_path, state.version, [report], keep=1).path
    resumed = start_learner()
    resumed.load_state(folder, state)
    assert resumed.version == state.version == 1
    for name, values in tensors(resumed).items():
        np.testing.assert_array_equal(values, then[name], err_msg=name)


def test_steps_that_were_skipped_stay_counted(start_learner: Any, tmp_path: Path) -> None:
    learner = start_learner()
    train(learner, 0, 1)
    with_nan = random_groups(1, version=1)
    for part in learner.model.shards():
        part.tensor.flatten()[:1] = float("nan")
        break
    report = learner.train_step(with_nan)
    assert report.metrics["learner/skipped_steps"] == 1
    folder, state = save(learner, tmp_path)
    assert state.skips == {"policy": (1, 1)}
    resumed = start_learner()
    resumed.load_state(folder, state)
    assert resumed._updaters["policy"].skips == (1, 1)


def test_what_does_not_fit_is_refused(start_learner: Any, tmp_path: Path) -> None:
    learner = start_learner(learner={"lora": {"rank": 3}})
    with pytest.raises(CheckpointError, match="nothing to save before the first step"):
        learner.copy_state()
    train(learner, 0, 1)
    folder, state = save(learner, tmp_path)
    with pytest.raises(CheckpointError, match="no copy"):
        learner.write_state(str(tmp_path))
    with pytest.raises(RunError, match="before any step"):
        learner.load_state(folder, state)
    for other in ({}, {"learner": {"lora": {"rank": 4}}}):
        with pytest.raises(CheckpointError, match="model, adapters and algorithm"):
            start_learner(**other).load_state(folder, state)
    with pytest.raises(CheckpointError, match="lacks"):
        start_learner(learner={"lora": {"rank": 3, "dora": True}}).load_state(folder, state)
    [shard] = Path(folder).glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(WeightError, match="damaged"):
        start_learner(learner={"lora": {"rank": 3}}).load_state(folder, state)
