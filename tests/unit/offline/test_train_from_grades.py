"""Reward models from grades: rows, the loss of several heads, the report, and the reward of them."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.data.packing import value_sequence
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import ConfigError, DataError, RecordError
from rlhf_cluster.offline.scorer_report import graded_report
from rlhf_cluster.offline.train_reward_model import (
    PointwiseRewardModelConfig,
    PointwiseRewardModelStage,
)
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from tests.support.builders.preference_ranks import (
    BAD,
    GOOD,
    bpe_tokenizer,
    context,
    gradients,
    stage_ranks,
)
from tests.support.builders.scored_groups import make_prompt, make_rollouts
from tests.support.builders.tiny_learner import VOCABULARY, build_llama

start_stage = pytest.fixture(stage_ranks)
tokenizer = pytest.fixture(scope="module")(bpe_tokenizer)

HEADS = ("helpful", "short")


def graded(**keys: Any) -> dict[str, Any]:
    return {"type": "pointwise_reward_model", **keys}


def graded_units(num: int, seed: int = 0, missing: float = 0.0) -> list[Unit]:
    """The last token decides on the first grade, the one before on the second."""
    draw = np.random.default_rng(seed)
    units = []
    for number in range(num):
        ids = draw.integers(10, VOCABULARY, int(draw.integers(4, 9))).astype(np.int32)
        ids[-2:] = draw.choice([GOOD, BAD], 2)
        grades = {f"grade/{i}": float(ids[-1 - i] == GOOD) for i in range(2)}
        if draw.random() < missing:
            del grades["grade/1"]
        units.append(
            Unit(
                sequences=(value_sequence(ids),),
                key=f"{number}",
                content=f"{number}",
                place=f"row {number}",
                values={"prompt_tokens": 2.0, **grades},
            )
        )
    return units


def read(tokenizer: Any, row: dict[str, Any], **keys: Any) -> Unit:
    stage = PointwiseRewardModelStage(PointwiseRewardModelConfig(**keys), context(tokenizer))
    (unit,) = stage.read(Row(0, "line 1", {"prompt": "one", "completion": "two", **row}), "f")
    return unit


def test_a_row_has_a_grade_for_each_head_or_null(tokenizer: Any) -> None:
    unit = read(tokenizer, {"helpful": 3, "short": None}, heads=HEADS)
    assert (
        tokenizer.decode(unit.sequences[0].prompt_ids) == "<bos><user>one<eos><assistant>two<eos>"
    )
    assert {k: v for k, v in unit.values.items() if k.startswith("grade")} == {"grade/0": 3.0}
    stage = PointwiseRewardModelStage(PointwiseRewardModelConfig(heads=HEADS), context(tokenizer))
    cut = stage.shorten(unit, unit.longest - 1)
    assert cut is not None
    assert cut.longest == unit.longest - 1
    assert cut.values["grade/0"] == 3.0
    with pytest.raises(UnusableRow) as error:
        read(tokenizer, {"helpful": None, "short": None}, heads=HEADS)
    assert error.value.reason == "unlabelled"
    with pytest.raises(DataError, match="line 1: no column 'short'"):
        read(tokenizer, {"helpful": 1}, heads=HEADS)
    with pytest.raises(DataError, match="line 1, column 'score': found str '3', expected a number"):
        read(tokenizer, {"score": "3"})
    with pytest.raises(DataError, match=r"column 'score': 3 is not a label in \[0, 1\]"):
        read(tokenizer, {"score": 3}, kind="bce")


@pytest.mark.parametrize("kind", ["mse", "bce"])
def test_the_gradient_of_several_heads_is_that_of_a_plain_loop(start_stage: Any, kind: str) -> None:
    learner = {"tokens_per_micro_batch": 24, "tokens_per_row": 24}
    rank = start_stage(graded(kind=kind, heads=HEADS), learner=learner)
    weight = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rank.model.module.value_head.weight.to_local().copy_(weight)
    weight.requires_grad_()
    units, lm = graded_units(7, missing=0.5), build_llama()
    assert 0 < sum("grade/1" not in unit.values for unit in units) < 7
    total = torch.zeros(())
    for unit in units:
        ids = torch.from_numpy(unit.sequences[0].prompt_ids).long()[None]
        scores = weight @ lm.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        own = []
        for head in range(2):
            grade = unit.values.get(f"grade/{head}")
            if grade is not None and kind == "mse":
                own.append((scores[head] - grade) ** 2)
            elif grade is not None:
                sign = 1 if grade else -1
                own.append(-torch.log(torch.sigmoid(sign * scores[head])))
        total = total + sum(own) / len(own)
    (total / 7).backward()
    found = gradients(rank, units)["value_head.weight"]
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


def test_heads_learn_their_own_grade_and_their_sum_is_a_reward(
    start_stage: Any, tiny_model_dir: str, tmp_path: Path
) -> None:
    rank = start_stage(graded(kind="bce", heads=HEADS), learner={"learning_rate": 2e-2})
    held_out = graded_units(40, seed=99)
    before = rank.evaluate(held_out)
    assert before["grading/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["grading/error"] == pytest.approx(0.5)
    for step in range(12):
        rank.train(graded_units(24, seed=step))
    assert rank.evaluate(held_out)["grading/loss"] < 0.5 * before["grading/loss"]
    report = rank.report(held_out)
    assert set(report["heads"]) == set(HEADS)
    for own in report["heads"].values():
        assert own["mean_squared_error"] < 0.5 * own["variance"]
        assert own["spearman"] > 0.6
    json.dumps(report)

    written = rank.write_final(str(tmp_path / "weights"))
    shapes = rank.tensor_shapes()
    version = store.commit(tmp_path / "weights", written.version, [written], 1, shapes)
    final = str(export_hf(version, tiny_model_dir, tmp_path / "final", num_values=2))
    section = RewardModelConfig(path=final, dtype="float32", output_weights=[1.0, -0.5])
    reward = RewardModel(section, RewardContext())
    ids = [unit.sequences[0].prompt_ids for unit in held_out[:5]]
    rollouts = make_rollouts(make_prompt(), [i.tolist() for i in ids])
    found = reward.read(rollouts, ids, [np.array([len(i) - 1]) for i in ids])
    wanted = [v[0, 0] - 0.5 * v[0, 1] for (v,) in rank.values(held_out[:5])]
    assert np.concatenate(found) == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(ConfigError, match="one output.*output_weights"):
        RewardModel(RewardModelConfig(path=final), RewardContext())


def test_the_report_on_grades_is_the_one_worked_out_by_hand() -> None:
    scores, lengths = np.array([1.0, 2.0, 3.0, 9.0]), np.array([4, 3, 2, 1])
    found = graded_report(scores, np.array([1.0, 3.0, 2.0, np.nan]), lengths)
    assert found["num_graded"] == 3
    assert found["mean_squared_error"] == pytest.approx(2 / 3)
    assert found["variance"] == pytest.approx(2 / 3)
    assert found["spearman"] == pytest.approx(0.5)
    assert found["length_correlation"] == pytest.approx(-1.0)
    assert "shorter" in str(found["warnings"])
    with pytest.raises(RecordError, match="one finite score"):
        graded_report(np.array([np.nan]), np.ones(1), np.ones(1))
