"""Process reward models: labelled steps to positions, the loss, the report, and the reward."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.config.pools import Scoring
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.reasoning_steps import reduce_scores, step_ends, step_spans
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import ConfigError, DataError, RecordError
from rlhf_cluster.offline.reward_model_losses import process_report, step_loss
from rlhf_cluster.offline.train_process_reward_model import (
    ProcessRewardModelStage,
    ProcessRewardModelStageConfig,
    _sequence,
)
from rlhf_cluster.records import Rollout
from rlhf_cluster.rewards.process_reward_model import ProcessReward, ProcessRewardConfig
from rlhf_cluster.scoring.served_rewards import Rewards, Totals
from rlhf_cluster.weights import store
from rlhf_cluster.weights.formats.huggingface import export_hf
from tests.support.builders.preference_ranks import bpe_tokenizer, context, gradients, stage_ranks
from tests.support.builders.scored_groups import make_prompt, make_rollouts
from tests.support.builders.tiny_learner import VOCABULARY, build_llama

start_stage = pytest.fixture(stage_ranks)
tokenizer = pytest.fixture(scope="module")(bpe_tokenizer)

RIGHT, WRONG = 7, 9
"""The last token of a right step, and of a wrong one."""


def process_stage(**keys: Any) -> dict[str, Any]:
    return {"type": "process_reward_model", **keys}


def step_units(num: int, seed: int = 0, unlabelled: float = 0.0) -> list[Unit]:
    """Responses of 1 to 4 steps; the last token of a step says whether it is right."""
    draw = np.random.default_rng(seed)
    units = []
    for number in range(num):
        prompt = draw.integers(10, VOCABULARY, 3).astype(np.int32)
        ids, labels = [], []
        for _ in range(int(draw.integers(1, 5))):
            size, right = int(draw.integers(1, 4)), bool(draw.random() < 0.5)
            ids += [*draw.integers(10, VOCABULARY, size), RIGHT if right else WRONG]
            label = float(right) if draw.random() >= unlabelled else np.nan
            labels += [*[np.nan] * size, label]
        is_end = np.isin(ids, [RIGHT, WRONG]).astype(np.float32)
        if np.isnan(labels).all():
            labels[-1] = 1.0
        units.append(
            Unit(
                sequences=(
                    _sequence(
                        prompt, np.array(ids, np.int32), np.array(labels, np.float32), is_end
                    ),
                ),
                key=f"{number}",
                content=f"{number}",
                place=f"row {number}",
                values={"prompt_tokens": 3.0},
            )
        )
    return units


# Rows


def read(tokenizer: Any, row: dict[str, Any], template: str = "chat", **keys: Any) -> Unit:
    section = ProcessRewardModelStageConfig(**keys)
    stage = ProcessRewardModelStage(section, context(tokenizer, template=template))
    (unit,) = stage.read(Row(0, "line 1", row), "f")
    return unit


def labelled_texts(tokenizer: Any, unit: Unit) -> list[tuple[str, float]]:
    """The response's text up to each labelled token, and the label."""
    [sequence] = unit.sequences
    ids = np.concatenate([sequence.prompt_ids, sequence.target_ids[:-1]])
    size = int(unit.values["prompt_tokens"])
    labels = sequence.streams["label"]
    assert (sequence.target_mask == ~np.isnan(labels)).all()  # type: ignore[union-attr]
    return [
        (tokenizer.decode(ids[size : place + 1]), float(labels[place]))
        for place in np.flatnonzero(~np.isnan(labels))
    ]


@pytest.mark.parametrize("template", ["chat", "none"])
def test_a_label_stands_at_the_last_token_of_its_step(tokenizer: Any, template: str) -> None:
    row = {"prompt": "one", "steps": ["one two", "three", "four"], "labels": [1.0, 0.25, False]}
    found = labelled_texts(tokenizer, read(tokenizer, row, template))
    assert found == [
        ("one two", 1.0),
        ("one two\nthree", 0.25),
        ("one two\nthree\nfour<eos>", 0.0),
    ]
    split = {"prompt": "one", "completion": "one two\nthree\nfour", "labels": [1, 0.25, 0]}
    assert labelled_texts(tokenizer, read(tokenizer, split, template)) == found


def test_a_step_without_a_label_is_context(tokenizer: Any) -> None:
    row = {"prompt": "one", "steps": ["two", "three", "four"], "labels": [None, True, None]}
    unit = read(tokenizer, row)
    assert labelled_texts(tokenizer, unit) == [("two\nthree", 1.0)]
    assert unit.num_trained == 1
    assert unit.sequences[0].streams["is_end"].sum() == 3


def test_the_separator_is_a_setting(tokenizer: Any) -> None:
    row = {"prompt": "one", "completion": "two\nthree; four", "labels": [1, 0]}
    found = labelled_texts(tokenizer, read(tokenizer, row, step_separator="; "))
    assert found == [("two\nthree", 1.0), ("two\nthree; four<eos>", 0.0)]


def test_the_end_of_a_step_is_where_reinforcement_learning_finds_it(tokenizer: Any) -> None:
    text = "one two\n\nthree\nfour five"
    unit = read(tokenizer, {"prompt": "one", "completion": text, "labels": [1, 0, 1]})
    [sequence] = unit.sequences
    ids = np.concatenate([sequence.prompt_ids, sequence.target_ids[:-1]])
    size = int(unit.values["prompt_tokens"])

    def decode(some: Any) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=True))

    silent = frozenset(tokenizer.all_special_ids)
    ends = step_ends(decode, ids[size:].tolist(), silent, text, step_spans(text, "\n"))
    assert np.flatnonzero(sequence.streams["is_end"]).tolist() == (size + ends).tolist()


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"steps": ["a", "b"], "labels": [1]}, "1 labels and 2 steps"),
        ({"steps": ["a", "b\nc"], "labels": [1, 1]}, "step 1 is 'b.*holds? the separator"),
        ({"steps": ["a", " "], "labels": [1, 1]}, "step 1 is ' '"),
        ({"steps": "a", "labels": [1]}, "expected a list of texts"),
        ({"steps": ["a"], "labels": [1.5]}, "label 0 is 1.5"),
        ({"steps": ["a"], "labels": 1}, "expected a list of labels"),
        ({"steps": ["a"], "completion": "a", "labels": [1]}, "expected the columns"),
        ({"steps": ["a"]}, "expected the columns"),
        ({"completion": 3, "labels": [1]}, "found int, expected text"),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_line(
    tokenizer: Any, row: dict[str, Any], words: str
) -> None:
    with pytest.raises(DataError, match=f"f, line 1.*{words}"):
        read(tokenizer, {"prompt": "one", **row})


def test_a_row_that_teaches_nothing_can_be_left_out(tokenizer: Any) -> None:
    for row, reason in (
        ({"steps": ["a"], "labels": [None]}, "unlabelled"),
        ({"completion": " ", "labels": [1]}, "empty"),
    ):
        with pytest.raises(UnusableRow) as error:
            read(tokenizer, {"prompt": "one", **row})
        assert error.value.reason == reason


def test_truncation_keeps_the_response_and_its_labels(tokenizer: Any) -> None:
    row = {"prompt": "one two three four five", "steps": ["two", "three"], "labels": [0.5, 1]}
    unit = read(tokenizer, row)
    stage = ProcessRewardModelStage(ProcessRewardModelStageConfig(), context(tokenizer))
    cut = stage.shorten(unit, unit.longest - 3)
    assert cut is not None
    assert cut.longest == unit.longest - 3
    assert labelled_texts(tokenizer, cut) == labelled_texts(tokenizer, unit)
    answer = unit.longest - int(unit.values["prompt_tokens"])
    assert stage.shorten(unit, answer + 1) is None


# The loss


@pytest.mark.parametrize("targets", ["soft", "hard"])
def test_the_gradient_is_that_of_a_plain_loop(start_stage: Any, targets: str) -> None:
    rank = start_stage(
        process_stage(targets=targets, threshold=0.3),
        learner={"tokens_per_micro_batch": 64, "tokens_per_row": 64},
    )
    weight = torch.randn(1, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        rank.model.module.value_head.weight.to_local().copy_(weight)
    weight.requires_grad_()
    units, lm = step_units(5, unlabelled=0.3), build_llama()
    for number, unit in enumerate(units):  # soft labels, on both sides of the threshold
        labels = unit.sequences[0].streams["label"]
        labels[labels == 1] = 0.4 + 0.1 * number
        labels[labels == 0] = 0.1
    total, count = torch.zeros(()), 0
    for unit in units:
        [sequence] = unit.sequences
        ids = torch.from_numpy(np.concatenate([sequence.prompt_ids, sequence.target_ids[:-1]]))
        hidden = lm.model(input_ids=ids.long()[None], use_cache=False).last_hidden_state[0]
        for place, label in enumerate(sequence.streams["label"]):
            if not math.isnan(label):
                target = float(label) if targets == "soft" else float(label >= 0.3)
                chance = torch.sigmoid((weight @ hidden[place]).squeeze())
                total = total - target * chance.log() - (1 - target) * (1 - chance).log()
                count += 1
    (total / count).backward()
    found = gradients(rank, units)["value_head.weight"]
    torch.testing.assert_close(found, weight.grad, rtol=1e-4, atol=1e-6)


def test_a_model_learns_to_tell_steps_it_has_not_seen_and_serves_as_a_reward(
    start_stage: Any, tiny_model_dir: str, tokenizer: Any, tmp_path: Path
) -> None:
    rank = start_stage(process_stage(), learner={"learning_rate": 1e-2})
    held_out = step_units(24, seed=99)
    before = rank.evaluate(held_out)
    assert before["process/loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert before["process/accuracy"] == 0.5
    for step in range(8):
        rank.train(step_units(24, seed=step))
    after = rank.evaluate(held_out)
    assert after["process/accuracy"] > 0.9
    report = rank.report(held_out)
    assert report["accuracy"] == pytest.approx(after["process/accuracy"])
    assert report["first_error_accuracy"] > 0.8 > report["accuracy_of_majority"]

    written = rank.write_final(str(tmp_path / "weights"))
    version = store.commit(
        tmp_path / "weights", written.version, [written], 1, rank.tensor_shapes()
    )
    final = export_hf(version, tiny_model_dir, tmp_path / "final", num_values=1)
    config = ProcessRewardConfig(path=str(final), dtype="float32", reduce="none")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    scoring = Scoring(rewards=[config], step_separator="; ")
    assert scoring.step_rewards
    rewards = Rewards(scoring, Totals())
    rewards.build(str(tmp_path / "tokenizer"), "cpu")
    reward = rewards._built["process_reward_model"]
    assert isinstance(reward, ProcessReward)
    assert reward._separator == "; "
    for unit, (values,) in zip(held_out[:4], rank.values(held_out[:4]), strict=True):
        [sequence] = unit.sequences
        ids = np.concatenate([sequence.prompt_ids, sequence.target_ids[:-1]])
        places = np.flatnonzero(sequence.streams["is_end"])
        rollouts = make_rollouts(make_prompt(ids=ids[:3].tolist()), [ids[3:].tolist()])
        [read] = reward._model.read(rollouts, [ids], [places])
        assert read == pytest.approx(values[places], abs=1e-4)


# The reward


class StepsByToken:
    """In place of a loaded model: the logit after a token is its id less 10."""

    version = "1"

    def read(
        self, rollouts: tuple[Rollout, ...], sequences: list[np.ndarray], places: list[np.ndarray]
    ) -> list[np.ndarray]:
        return [ids[at].astype(np.float64) - 10 for ids, at in zip(sequences, places, strict=True)]


def step_reward(tokenizer: Any, tmp_path: Path, reduce: Any) -> ProcessReward:
    reward = object.__new__(ProcessReward)
    reward._config = ProcessRewardConfig(path="x", reduce=reduce)
    reward._separator, reward._tokenizer = "\n", tokenizer
    reward._silent = frozenset(tokenizer.all_special_ids)
    reward._model = StepsByToken()  # type: ignore[assignment]
    return reward


def test_a_reward_reads_each_step_at_its_last_token_and_reduces(
    tokenizer: Any, tmp_path: Path
) -> None:
    texts = ["one two\nthree", "four"]
    end = tokenizer.eos_token_id
    ids = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
    prompt = make_prompt()
    rollouts = make_rollouts(prompt, ids)
    steps = [text.split("\n") for text in texts]
    found = step_reward(tokenizer, tmp_path, "none").score_steps(prompt, rollouts, texts, steps)
    assert [len(own) for own in found] == [2, 1]
    two = tokenizer("two", add_special_tokens=False)["input_ids"][-1]
    ends = [[two, end], [end]]
    expected = [[1 / (1 + math.exp(10 - token)) for token in own] for own in ends]
    for own, wanted in zip(found, expected, strict=True):
        assert own == pytest.approx(wanted)
    for reduce, values in (
        ("min", [min(own) for own in expected]),
        ("product", [math.prod(own) for own in expected]),
        ("last", [own[-1] for own in expected]),
        ("mean", [sum(own) / len(own) for own in expected]),
    ):
        reward = step_reward(tokenizer, tmp_path, reduce)
        assert reward.score(prompt, rollouts, texts) == pytest.approx(values)
    with pytest.raises(ConfigError, match="reduce = 'none' scores steps"):
        step_reward(tokenizer, tmp_path, "none").score(prompt, rollouts, texts)


def test_only_without_a_reduction_does_it_score_steps() -> None:
    assert ProcessRewardConfig(path="x", reduce="none").scores_steps
    assert not ProcessRewardConfig(path="x").scores_steps
    assert ProcessRewardConfig(path="x").reduce == "min"


# The report


def test_the_report_of_three_responses_is_the_one_worked_out_by_hand() -> None:
    scores = [np.array([0.9, 0.2, 0.8]), np.array([0.7, 0.6]), np.array([0.5, 0.9])]
    labels = [np.array([1.0, 0.0, 0.0]), np.array([1.0, 0.0]), np.array([1.0, 1.0])]
    found = process_report(scores, labels, 0.5)
    assert (found["num_responses"], found["num_steps"], found["num_unjudged"]) == (3, 7, 0)
    assert found["accuracy"] == pytest.approx((1 + 1 + 0 + 1 + 0 + 0.5 + 1) / 7)
    assert found["accuracy_of_majority"] == pytest.approx(4 / 7)
    squares = [0.1, 0.2, 0.8, 0.3, 0.6, 0.5, 0.1]
    assert found["brier"] == pytest.approx(sum(s * s for s in squares) / 7)
    # the first: found; the second: not; the third: no error, and none claimed
    assert found["first_error_accuracy"] == pytest.approx(2 / 3)
    assert (found["first_error_with_error"], found["first_error_without_error"]) == (0.5, 1.0)
    assert found["first_error_f1"] == pytest.approx(2 / 3)
    assert found["first_error_low"] < 2 / 3 < found["first_error_high"]


def test_a_response_whose_first_error_is_unknown_is_counted_apart() -> None:
    nan = np.nan
    labels = [np.array([nan, 0.0]), np.array([0.0, nan]), np.array([1.0, nan])]
    found = process_report([np.array([0.1, 0.1])] * 3, labels, 0.5)
    assert found["num_unjudged"] == 2
    assert found["num_steps"] == 3
    assert found["first_error_accuracy"] == 1.0
    assert found["first_error_without_error"] is None
    assert found["first_error_f1"] is None
    # with the share of right completions, one is enough
    some = process_report([np.array([0.9])], [np.array([0.125])], 0.01)
    assert some["accuracy"] == 1.0


def test_what_cannot_be_reported_is_refused() -> None:
    with pytest.raises(RecordError, match="one score and one label"):
        process_report([np.ones(2)], [np.ones(3)], 0.5)
    with pytest.raises(RecordError, match=r"must be in \[0, 1\]"):
        process_report([np.array([1.1])], [np.ones(1)], 0.5)
    with pytest.raises(RecordError, match="at least one labelled step"):
        process_report([np.ones(1)], [np.array([np.nan])], 0.5)
    with pytest.raises(RecordError, match="one logit and one label a step"):
        step_loss(torch.zeros(2), torch.zeros(3))


def test_the_weakest_step_the_product_and_the_last_one() -> None:
    scores = np.array([0.5, 0.25, 1.0])
    found = [reduce_scores(scores, how) for how in ("min", "product", "last", "mean")]
    assert found == pytest.approx([0.25, 0.125, 1.0, 1.75 / 3])
