"""A reference that follows the policy (TR-DPO): when and where it moves, what is asked anew, resume."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.offline_rank import StageRank
from rlhf_cluster.offline.train_preference import (
    PreferenceConfig,
    PreferenceStage,
)
from rlhf_cluster.weights import store
from tests.support.builders.preference_ranks import (
    context,
    random_pairs,
    stage_config,
    stage_ranks,
)

start_stage = pytest.fixture(stage_ranks)

SOFT = {"type": "ema", "every": 2, "decay": 0.6}
HARD = {"type": "periodic", "every": 2}


def following(update: dict[str, Any], loss: str = "dpo") -> dict[str, Any]:
    return {"type": "preference", "loss": {"type": loss}, "reference_update": update}


def weights(rank: StageRank, reference: bool = False) -> dict[str, torch.Tensor]:
    parts = rank._reference.shards() if reference else rank.model.shards()  # type: ignore
    return {part.name: part.tensor.clone() for part in parts}


@pytest.mark.parametrize(("update", "share"), [(SOFT, 0.4), (HARD, 1.0)], ids=["soft", "hard"])
def test_the_reference_moves_by_its_share_every_other_step(
    start_stage: Any, update: dict[str, Any], share: float
) -> None:
    rank = start_stage(following(update), learner={"learning_rate": 1e-2})
    expected = policy = weights(rank)
    for step in range(1, 5):
        rank.train(random_pairs(6, seed=step))
        policy = weights(rank)
        if step % 2 == 0:
            expected = {n: (1 - share) * w + share * policy[n] for n, w in expected.items()}
        for name, weight in weights(rank, reference=True).items():
            torch.testing.assert_close(weight, expected[name], rtol=1e-6, atol=1e-7)
    start = weights(start_stage(following(HARD)))
    assert any((policy[name] - weight).abs().max() > 0.01 for name, weight in start.items())


def test_after_a_hard_move_the_policy_is_its_reference_to_the_bit(start_stage: Any) -> None:
    rank = start_stage(following(HARD), learner={"learning_rate": 1e-2})
    units = random_pairs(4)
    rank.train(units)
    assert rank.evaluate(units)["preference/chosen_log_ratio"] != 0.0
    rank.train(units)
    found = rank.evaluate(units)
    assert found["preference/chosen_log_ratio"] == 0.0
    assert found["preference/margin"] == 0.0


@pytest.mark.parametrize("update", [SOFT, HARD], ids=["soft", "hard"])
def test_a_resumed_stage_has_the_reference_that_it_had(
    start_stage: Any, tmp_path: Path, update: dict[str, Any]
) -> None:
    batches = [random_pairs(4, seed=step) for step in range(5)]
    rank = start_stage(following(update), learner={"learning_rate": 1e-2})
    for batch in batches[:3]:
        rank.train(batch)
    state = rank.copy_state()
    report = rank.write_state(str(tmp_path))
    store.commit(tmp_path, report.version, [report], keep=1)
    for batch in batches[3:]:
        rank.train(batch)
    expected = weights(rank), weights(rank, reference=True)
    again = start_stage(following(update), learner={"learning_rate": 1e-2})
    again.load_state(str(tmp_path / "v000003"), state)
    for batch in batches[3:]:
        again.train(batch)
    for wanted, found in zip(
        expected, (weights(again), weights(again, reference=True)), strict=True
    ):
        for name, weight in found.items():
            assert torch.equal(weight, wanted[name]), name


class AskedPasses:
    """Passes of a fake model, each token of which has log-probability -1, that counts its calls."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    def logprobs(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
        return [tuple(-np.ones(len(s.target_ids), np.float32) for s in u.sequences) for u in units]

    def reference(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
        self.asked.append(len(units))
        return self.logprobs(units)

    values = logprobs


def test_what_the_reference_said_is_asked_again_after_it_moved() -> None:
    stage = PreferenceStage(PreferenceConfig.model_validate(following(SOFT)), context())
    units, passes = random_pairs(4), AskedPasses()
    stage.loss(units, passes)
    stage.loss(units, passes)
    stage.reference_moved()
    stage.loss(units, passes)
    assert passes.asked == [4, 4]
    assert [stage.reference_share(step) for step in range(1, 5)] == [0, pytest.approx(0.4)] * 2


@pytest.mark.parametrize(
    ("stage", "learner", "words"),
    [
        (following(SOFT, "simpo"), {}, "reference_update.type = 'ema' with loss.type = 'simpo'"),
        (following(HARD), {"lora": {"rank": 2}}, r"'periodic' with \[learner.lora\]"),
        (following(SOFT), {"backend": "zero3"}, "'ema' with learner.backend = 'zero3'"),
    ],
)
def test_a_reference_that_cannot_follow_is_refused(
    stage: dict[str, Any], learner: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        stage_config("model", stage, learner=learner)
