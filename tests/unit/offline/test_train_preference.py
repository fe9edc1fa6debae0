"""Preference optimisation as a stage: what one rank computes, against plain loops; what it learns."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_cluster.algorithms.preference_loss_config import PREFERENCE_LOSSES
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.rows import Row
from rlhf_cluster.data.units import Unit
from rlhf_cluster.errors import DataError
from rlhf_cluster.offline.train_preference import (
    UNIT_BYTES,
    PreferenceConfig,
    PreferenceStage,
)
from rlhf_cluster.offline.train_reward_model import (
    RewardModelStage,
    RewardModelStageConfig,
)
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
from tests.support.builders.tiny_learner import build_llama

start_stage = pytest.fixture(stage_ranks)
tokenizer = pytest.fixture(scope="module")(bpe_tokenizer)


def preference(loss: str, **keys: Any) -> dict[str, Any]:
    return {"type": "preference", "loss": {"type": loss, **keys}}


def plain_logprob(lm: Any, prompt: np.ndarray, answer: np.ndarray) -> torch.Tensor:
    """Of the whole answer, one at a time."""
    ids = torch.from_numpy(np.concatenate([prompt, answer])).long()
    logits = lm(input_ids=ids[None], use_cache=False).logits[0]
    scored = logits[len(prompt) - 1 : -1].float().log_softmax(-1)
    return scored.gather(1, ids[len(prompt) :, None]).sum()


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_the_gradient_of_dpo_is_that_of_a_plain_loop_in_any_layout(
    start_stage: Any, layout: dict[str, Any]
) -> None:
    rank = start_stage(preference("dpo", beta=0.3, nll_coef=0.2), learner=layout)
    units, lm = random_pairs(6), build_llama()
    total = torch.zeros(())
    for unit in units:
        sides = [plain_logprob(lm, s.prompt_ids, s.target_ids) for s in unit.sequences]
        # the reference is where the policy stands
        ratios = [side - side.detach() for side in sides]
        total = total - torch.log(torch.sigmoid(0.3 * (ratios[0] - ratios[1])))
        total = total - 0.2 * sides[0] / len(unit.sequences[0].target_ids)
    (total / 6).backward()
    name = "layers.0.self_attn.q_proj.weight"
    (own,) = (g for n, g in gradients(rank, units).items() if n.endswith(name))
    expected = dict(lm.named_parameters())[f"model.{name}"].grad
    assert expected is not None
    torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("type", PREFERENCE_LOSSES)
def test_every_loss_falls_on_its_own_batch_and_prefers_what_was_chosen(
    start_stage: Any, type: str
) -> None:
    rank = start_stage(preference(type))
    units = random_pairs(4)
    first = rank.evaluate(units)
    assert (rank._reference is not None) is PREFERENCE_LOSSES[type].needs_reference
    if PREFERENCE_LOSSES[type].needs_reference:
        # S38: at the start the policy is its reference, exactly
        assert first["preference/margin"] == 0.0
        assert first["preference/accuracy"] == 0.5
        assert first["preference/chosen_log_ratio"] == 0.0
    for _ in range(3):
        rank.train(units)
    last = rank.evaluate(units)
    assert last["preference/loss"] < first["preference/loss"]
    assert last["preference/margin"] > first["preference/margin"]
    assert {"preference/chosen_logprob", "preference/rejected_logprob"} <= set(last)


@pytest.mark.parametrize("head_dtype", ["float32", "model"])
def test_b9_in_bfloat16_the_policy_is_its_reference_at_the_start_whatever_its_logits_type(
    start_stage: Any, head_dtype: str
) -> None:
    rank = start_stage(preference("dpo"), learner={"dtype": "bfloat16", "head_dtype": head_dtype})
    assert rank.evaluate(random_pairs(4))["preference/chosen_log_ratio"] == 0.0


def test_dpo_learns_what_tells_pairs_apart_that_it_has_not_seen(start_stage: Any) -> None:
    rank = start_stage(preference("dpo", beta=0.5), learner={"learning_rate": 1e-2})
    held_out = random_pairs(32, seed=99)
    for step in range(6):
        rank.train(random_pairs(24, seed=step))
    after = rank.evaluate(held_out)
    assert after["preference/accuracy"] > 0.85
    report = rank.report(held_out)
    assert report["accuracy"] == after["preference/accuracy"]
    assert report["chosen_log_ratio"] == pytest.approx(
        after["preference/chosen_log_ratio"], rel=1e-3
    )
    assert report["displaced"] is (after["preference/chosen_log_ratio"] < 0)
    warned = any("likelihood displacement" in warning for warning in report["warnings"])
    assert warned is report["displaced"]
    json.dumps(report)


def test_the_baseline_of_kto_is_the_mean_over_unmatched_responses(start_stage: Any) -> None:
    rank = start_stage(preference("kto", beta=0.5), learner={"learning_rate": 1e-2})
    # all are wanted, so that the policy moves towards any response, unmatched ones too
    units = [
        replace(u, sequences=u.sequences[:1], values={"desirable": 1.0}) for u in random_pairs(6)
    ]
    for _ in range(3):
        rank.train(units)
    policy, start = build_llama(), build_llama()
    trained = {n: p.full_tensor() for n, p in rank.model.module.lm.named_parameters()}  # type: ignore
    policy.load_state_dict(trained, strict=False)
    with torch.no_grad():
        ratios = [
            float(plain_logprob(policy, *both) - plain_logprob(start, *both))
            for both in (
                (u.sequences[0].prompt_ids, units[(i + 1) % 6].sequences[0].target_ids)
                for i, u in enumerate(units)
            )
        ]
    found = rank.evaluate(units)["preference/kl_baseline"]
    assert np.mean(ratios) > 0.01
    assert found == pytest.approx(np.mean(ratios), rel=1e-3, abs=1e-4)


class CountedPasses:
    """Passes of a fake model, each token of which has log-probability -1, that counts its calls."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def logprobs(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
        return [tuple(-np.ones(len(s.target_ids), np.float32) for s in u.sequences) for u in units]

    def reference(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
        self.asked.append([unit.content for unit in units])
        return self.logprobs(units)

    values = logprobs


def test_the_reference_is_asked_for_each_pair_once() -> None:
    stage, passes = PreferenceStage(PreferenceConfig(), context()), CountedPasses()
    units = random_pairs(4)
    for batch in (units[:3], units[1:], units):
        stage.loss(batch, passes)
    assert passes.asked == [["0", "1", "2"], ["3"]]


def test_l13_the_reference_of_no_more_units_is_kept_than_there_is_room_for() -> None:
    units = random_pairs(6)
    sizes = [UNIT_BYTES + sum(4 * len(s.target_ids) for s in unit.sequences) for unit in units]
    room = sizes[0] + sizes[1] + min(sizes) - 1
    section = PreferenceConfig(reference_cache_bytes=room)
    stage, passes = PreferenceStage(section, context()), CountedPasses()
    for _ in range(3):
        stage.loss(units, passes)
    assert passes.asked == [list("012345"), list("2345"), list("2345")]
    stage.reference_moved()
    stage.loss(units[2:4], passes)
    stage.loss(units[1:4], passes)
    assert passes.asked[3:] == [["2", "3"], ["1"]], "what moved gives its room back"


def test_l13_without_room_each_batch_asks_once_and_its_loss_is_the_same(start_stage: Any) -> None:
    units = random_pairs(4)
    units = [*units, units[0]]
    stage, passes = (
        PreferenceStage(PreferenceConfig(reference_cache_bytes=0), context()),
        CountedPasses(),
    )
    stage.loss(units, passes)
    stage.loss(units, passes)
    assert passes.asked == [list("0123")] * 2
    kept, none = (
        gradients(start_stage({**preference("dpo"), "reference_cache_bytes": room}), units)
        for room in (2**20, 0)
    )
    assert set(kept) == set(none)
    for name, gradient in kept.items():
        torch.testing.assert_close(none[name], gradient, rtol=0, atol=0)


def test_l13_what_is_kept_holds_no_batch_alive() -> None:
    class Views(CountedPasses):
        def reference(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
            whole = np.zeros(10_000, np.float32)
            return [tuple(whole[: len(s.target_ids)] for s in u.sequences) for u in units]

    stage = PreferenceStage(PreferenceConfig(), context())
    stage.loss(random_pairs(2), Views())
    assert [v.base for kept in stage._kept.values() for v in kept] == [None] * 4


class FallenPasses(CountedPasses):
    """A policy under which a chosen response has lost 3 nats and a rejected one 5."""

    def logprobs(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
        found = super().logprobs(units)
        return [(chosen - 3 / len(chosen), other - 5 / len(other)) for chosen, other in found]

    def reference(self, units: Sequence[Unit]) -> list[tuple[np.ndarray, ...]]:
        return super().logprobs(units)


def test_a_margin_that_grows_while_both_fall_is_flagged() -> None:
    report = PreferenceStage(PreferenceConfig(), context()).report(random_pairs(4), FallenPasses())
    assert report["accuracy"] == 1.0
    assert report["chosen_log_ratio"] == pytest.approx(-3)
    assert report["displaced"] is True
    assert any("by 3 nats in the mean (likelihood displacement)" in w for w in report["warnings"])


def test_a_batch_of_one_prompt_has_the_baseline_zero() -> None:
    section = PreferenceConfig.model_validate(preference("kto"))
    stage = PreferenceStage(section, context())
    unit = random_pairs(1)[0]
    assert stage._baseline([unit, unit], CountedPasses()) == 0.0


# Reading


def test_a_dialogue_becomes_the_ids_that_generation_meets(tokenizer: Any) -> None:
    row = Row(0, "line 1", DIALOGUE)
    (unit,) = PreferenceStage(PreferenceConfig(), context(tokenizer)).read(row, "f")
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    asked = tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
    for sequence, word in zip(unit.sequences, ("four", "five"), strict=True):
        assert sequence.prompt_ids.tolist() == asked
        assert tokenizer.decode(sequence.target_ids) == word + "<eos>"
        assert sequence.target_mask is None
    assert (unit.key, unit.place) == ("one", "f, line 1")
    (scored,) = RewardModelStage(RewardModelStageConfig(), context(tokenizer)).read(row, "f")
    for sequence, own in zip(scored.sequences, unit.sequences, strict=True):
        assert sequence.prompt_ids.tolist() == [*own.prompt_ids, *own.target_ids]
    assert scored.values == {"margin": 0.5, "prompt_tokens": float(len(asked))}
    other = {**DIALOGUE, "rejected": DIALOGUE["chosen"]}
    with pytest.raises(UnusableRow, match="f, line 1: two of the responses are the same"):
        PreferenceStage(PreferenceConfig(), context(tokenizer)).read(Row(0, "line 1", other), "f")


def test_plain_text_is_read_without_a_template_and_a_dialogue_is_not(tokenizer: Any) -> None:
    stage = PreferenceStage(PreferenceConfig(), context(tokenizer, template="none"))
    row = Row(0, "line 1", {"prompt": "one ", "chosen": "two", "rejected": "three"})
    (unit,) = stage.read(row, "f")
    assert tokenizer.decode(unit.sequences[0].prompt_ids) == "<bos>one "
    assert tokenizer.decode(unit.sequences[1].target_ids) == "three<eos>"
    with pytest.raises(DataError, match="f, line 2: found a dialogue, .*template = 'chat'"):
        stage.read(Row(1, "line 2", DIALOGUE), "f")


def test_kto_reads_verdicts_and_pairs(tokenizer: Any) -> None:
    section = PreferenceConfig.model_validate(preference("kto"))
    stage = PreferenceStage(section, context(tokenizer))
    row = {"prompt": "one", "completion": "two", "label": True}
    (unit,) = stage.read(Row(0, "line 1", row), "f")
    assert len(unit.sequences) == 1
    assert unit.values["desirable"] == 1.0
    (pair,) = stage.read(Row(1, "line 2", DIALOGUE), "f")
    assert len(pair.sequences) == 2
    dpo = PreferenceStage(PreferenceConfig(), context(tokenizer))
    with pytest.raises(DataError, match="line 1: a single response with a label"):
        dpo.read(Row(0, "line 1", row), "f")


@pytest.mark.parametrize("values", [False, True])
def test_truncation_takes_the_oldest_of_the_prompt_and_never_of_a_response(values: bool) -> None:
    prompt = np.arange(20, 30, dtype=np.int32)
    answers = [np.array([GOOD] * 6, dtype=np.int32), np.array([BAD] * 3, dtype=np.int32)]
    unit = pair_unit(0, prompt, answers, values)
    stage: Any = (
        RewardModelStage(RewardModelStageConfig(), context())
        if values
        else PreferenceStage(PreferenceConfig(), context())
    )
    cut = stage.shorten(unit, 10)
    assert cut.longest == 10
    kept = 4 if values else 5  # the last target of a policy's sequence is not read
    expected = [20, *range(30 - kept + 1, 30)]
    for sequence, answer in zip(cut.sequences, answers, strict=True):
        if values:
            assert sequence.prompt_ids.tolist() == [*expected, *answer]
        else:
            assert sequence.prompt_ids.tolist() == expected
            assert sequence.target_ids.tolist() == answer.tolist()
    assert stage.shorten(unit, 6) is None, "no room for a prompt beside the longest response"
