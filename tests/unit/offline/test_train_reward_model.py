"""Reward models as a stage: what one rank computes, against plain loops, and what it learns."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import DataError
from rlhf_cluster.learner.offline_rank import StageRank
from rlhf_cluster.offline.train_reward_model import RewardModelStage, RewardModelStageConfig
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_model import RewardModel, RewardModelConfig
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from tests.support.builders.preference_ranks import (
    BAD,
    DIALOGUE,
    GOOD,
    LAYOUTS,
    bpe_tokenizer,
    context,
    gradients,
    pair_unit,
    random_pairs,
    stage_ranks,
)
from tests.support.builders.tiny_learner import VOCABULARY, build_llama, make_prompt, make_scored

REWARD_MODEL = {"type": "reward_model"}

start_stage = pytest.fixture(stage_ranks)
tokenizer = pytest.fixture(scope="module")(bpe_tokenizer)


def reward_model(type: str = "bradley_terry", **keys: Any) -> dict[str, Any]:
    return {"type": "reward_model", "loss": {"type": type, **keys}}


def set_head(rank: StageRank) -> torch.Tensor:
    """A head of values that is not 0."""
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rank.model.module.value_head.weight.to_local().copy_(weight)  # type: ignore[union-attr]
    return weight


def plain_scores(lm: Any, weight: torch.Tensor, unit: Unit) -> list[torch.Tensor]:
    """The score at the last real token, one sequence at a time."""
    found = []
    for sequence in unit.sequences:
        ids = torch.from_numpy(sequence.prompt_ids).long()[None]
        hidden = lm.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1]
        found.append((weight @ hidden).squeeze())
    return found


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_s22_a_reward_models_gradient_is_that_of_a_plain_loop_in_any_layout(
    start_stage: Any, layout: dict[str, Any]
) -> None:
    rank = start_stage(reward_model(label_smoothing=0.1, centring=0.05), learner=layout)
    weight = set_head(rank).requires_grad_()
    units, lm = random_pairs(6, values=True), build_llama()
    total = torch.zeros(())
    for number, unit in enumerate(units):
        chosen, rejected = plain_scores(lm, weight, unit)
        lead = chosen - rejected - 0.1 * number
        own = -0.9 * torch.log(torch.sigmoid(lead)) - 0.1 * torch.log(torch.sigmoid(-lead))
        total = total + own + 0.05 * (chosen + rejected) ** 2
    (total / 6).backward()
    found = gradients(rank, units)
    torch.testing.assert_close(found["value_head.weight"], weight.grad, rtol=1e-4, atol=1e-6)
    name = "layers.0.self_attn.q_proj.weight"
    (own,) = (g for n, g in found.items() if n.endswith(name))
    expected = dict(lm.named_parameters())[f"model.{name}"].grad
    assert expected is not None
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-6)


def test_a_reward_model_starts_as_a_coin_and_learns_pairs_that_it_has_not_seen(
    start_stage: Any,
) -> None:
    rank = start_stage(REWARD_MODEL, learner={"learning_rate": 1e-2})
    held_out = random_pairs(48, seed=99, values=True)
    held_out = [replace(u, values={**u.values, "margin": 0.0}) for u in held_out]
    before = rank.evaluate(held_out)
    assert before["ranking/accuracy"] == 0.5
    assert before["ranking/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["stage/loss"] == pytest.approx(before["ranking/loss"], rel=1e-6)
    for step in range(8):
        units = random_pairs(24, seed=step, values=True)
        rank.train([replace(u, values={**u.values, "margin": 0.0}) for u in units])
    after = rank.evaluate(held_out)
    assert after["ranking/accuracy"] > 0.85
    report = rank.report(held_out)
    assert report["accuracy"] == after["ranking/accuracy"]
    assert report["accuracy_low"] < report["accuracy"] < report["accuracy_high"]
    assert report["num_pairs"] == 48
    assert report["margin_mean"] == pytest.approx(after["ranking/margin"], rel=1e-4)
    json.dumps(report)


def test_what_is_exported_scores_alike_as_a_reward(
    start_stage: Any, tiny_model_dir: str, tmp_path: Path
) -> None:
    rank = start_stage(REWARD_MODEL)
    units = random_pairs(6, values=True)
    for _ in range(2):
        rank.train(units)
    written = rank.write_final(str(tmp_path / "weights"))
    shapes = rank.tensor_shapes()
    version = store.commit(tmp_path / "weights", written.version, [written], 1, shapes)
    final = export_hf(version, tiny_model_dir, tmp_path / "final", num_values=1)
    reward = RewardModel(RewardModelConfig(path=str(final), dtype="float32"), RewardContext())
    for unit, scores in zip(units, rank.values(units), strict=True):
        size = int(unit.values["prompt_tokens"])
        prompt = make_prompt(0, unit.sequences[0].prompt_ids[:size].tolist())
        rollouts = [
            make_scored(
                f"{i}", prompt, ids := s.prompt_ids[size:].tolist(), [-1.0] * len(ids), 0.0
            ).rollout
            for i, s in enumerate(unit.sequences)
        ]
        found = reward.score(prompt, rollouts, ["", ""])
        assert found == pytest.approx([float(v[0]) for v in scores], abs=1e-5)
        assert found[0] != found[1]


def test_margins_of_the_data_count_only_where_they_are_wanted(start_stage: Any) -> None:
    units = random_pairs(6, values=True)
    wanted = start_stage(REWARD_MODEL).evaluate(units)["ranking/loss"]
    ignored = start_stage(reward_model(margins=False)).evaluate(units)["ranking/loss"]
    assert ignored == pytest.approx(math.log(2), rel=1e-6)
    expected = np.mean([math.log1p(math.exp(0.1 * n)) for n in range(6)])
    assert wanted == pytest.approx(expected, rel=1e-6)


def rankings(num: int, seed: int = 0) -> list[Unit]:
    """Of 2 to 4 responses, the number of the better token falls from the best on."""
    draw = np.random.default_rng(seed)
    units = []
    for number in range(num):
        prompt = draw.integers(10, VOCABULARY, 3).astype(np.int32)
        size = int(draw.integers(2, 5))
        answers = [np.array([GOOD] * (4 - k) + [BAD] * k, dtype=np.int32) for k in range(size)]
        units.append(pair_unit(number, prompt, answers, values=True))
    return units


@pytest.mark.parametrize("budget", [4096, 64])
def test_rankings_of_unequal_length_have_the_gradient_of_a_plain_loop(
    start_stage: Any, budget: int
) -> None:
    learner = {"tokens_per_micro_batch": budget, "tokens_per_row": 64}
    rank = start_stage(
        reward_model("plackett_luce", max_responses=4), learner=learner, data={"max_tokens": 16}
    )
    weight = set_head(rank).requires_grad_()
    units, lm = rankings(5), build_llama()
    total = torch.zeros(())
    for unit in units:
        scores = torch.stack(plain_scores(lm, weight, unit))
        for place in range(len(scores)):
            total = total + scores[place:].logsumexp(0) - scores[place]
    (total / 5).backward()
    found = gradients(rank, units)["value_head.weight"]
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


def test_rankings_are_learned_and_reported_by_their_ends(start_stage: Any) -> None:
    section = reward_model("plackett_luce", max_responses=4)
    rank = start_stage(section, learner={"learning_rate": 1e-2}, data={"max_tokens": 16})
    assert rank.evaluate(rankings(12, seed=9))["ranking/accuracy"] == 0.5
    for step in range(5):
        rank.train(rankings(12, seed=step))
    assert rank.evaluate(rankings(12, seed=9))["ranking/accuracy"] > 0.8
    assert rank.report(rankings(12, seed=9))["num_pairs"] == 12


def test_a_ranking_becomes_one_unit_and_one_that_is_too_long_is_refused(tokenizer: Any) -> None:
    section = RewardModelStageConfig.model_validate(reward_model("plackett_luce", max_responses=3))
    stage = RewardModelStage(section, context(tokenizer))
    row = {"prompt": "one", "ranking": ["two", "three", "four"]}
    (unit,) = stage.read(Row(0, "line 1", row), "f")
    shown = [tokenizer.decode(s.prompt_ids) for s in unit.sequences]
    assert shown == [f"<bos><user>one<eos><assistant>{w}<eos>" for w in ("two", "three", "four")]
    assert len(stage.read(Row(1, "line 2", DIALOGUE), "f")[0].sequences) == 2
    longer = {"prompt": "one", "ranking": ["two", "three", "four", "five"]}
    with pytest.raises(
        DataError, match=r"line 3: 4 responses, over stage\.loss\.max_responses = 3"
    ):
        stage.read(Row(2, "line 3", longer), "f")
    pairs = RewardModelStage(RewardModelStageConfig(), context(tokenizer))
    with pytest.raises(DataError, match="line 1: a ranking, and pairs are needed.*'plackett_luce'"):
        pairs.read(Row(0, "line 1", row), "f")
