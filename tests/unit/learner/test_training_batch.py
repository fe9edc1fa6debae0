"""The staleness gate, and what becomes of a group on its way to the passes."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.errors import RecordError, StalenessError
from rlhf_cluster.learner.step.training_batch import (
    check_staleness,
    training_batch,
)
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.tiny_learner import (
    make_group,
    make_prompt,
    make_scored,
    random_groups,
)


def _group(number: int = 0, **changes: Any) -> ExperienceGroup:
    prompt = make_prompt(number, [1, 2])
    values = {"version": 0, "reward": 1.0, **changes}
    scored = make_scored(f"{number}/0", prompt, [3, 4, 5], [-1.0, -2.0, -3.0], **values)
    return make_group(number, prompt, [scored])


def test_staleness_is_counted_by_trained_token() -> None:
    groups = [_group(0, version=[3, 4, 4]), _group(1, version=[1, 4, 4], mask=[0, 1, 1])]
    found = check_staleness(groups, version=5, max_staleness=2)
    assert found == {"staleness/mean": pytest.approx(6 / 5), "staleness/max": 2.0}


def test_one_token_over_the_bound_raises_with_group_version_and_bound() -> None:
    groups = [_group(0, version=4), _group(7, version=[4, 2, 4])]
    with pytest.raises(StalenessError) as error:
        check_staleness(groups, version=5, max_staleness=2)
    for part in (groups[1].group_id, "version 2", "staleness 3", "max_staleness = 2"):
        assert part in str(error.value)
    check_staleness(groups, version=5, max_staleness=3)


def test_a_token_from_a_version_that_the_learner_has_not_reached_raises() -> None:
    with pytest.raises(StalenessError, match="staleness -1"):
        check_staleness([_group(version=6)], version=5, max_staleness=2)


def _advantages(groups: list[ExperienceGroup], values: list[float]) -> list[list[np.ndarray]]:
    given = iter(values)
    return [
        [np.full(len(s.rollout.response_ids), next(given), np.float32) for s in g.scored]
        for g in groups
    ]


def test_s4_rollouts_without_a_loss_leave_the_passes_but_not_the_denominator() -> None:
    groups = [_group(0), _group(1, mask=[1, 0, 1]), _group(2)]
    advantages = _advantages(groups, [0.5, 0.7, 0.0])
    batch = training_batch(groups, advantages, version=0, drop_zero_advantages=True)
    assert batch.num_tokens == [3, 2, 3]
    assert [s is None for s in batch.sequences] == [False, False, True]
    assert batch.num_left_out == 1
    kept = training_batch(groups, advantages, version=0, drop_zero_advantages=False)
    assert (kept.num_tokens, kept.num_left_out) == ([3, 2, 3], 0)


def test_tokens_and_streams_arrive_as_they_were_sampled() -> None:
    groups = random_groups(0, with_reference=True)
    values = np.linspace(1, 2, 16).tolist()
    batch = training_batch(
        groups, _advantages(groups, values), version=0, drop_zero_advantages=True
    )
    scored = [s for g in groups for s in g.scored]
    assert batch.streams == ("sampled_logprobs", "advantages", "staleness", "ref_logprobs")
    for sequence, item, value in zip(batch.sequences, scored, values, strict=True):
        assert sequence is not None
        np.testing.assert_array_equal(sequence.streams["staleness"], -item.rollout.versions)
        np.testing.assert_array_equal(sequence.prompt_ids, item.rollout.prompt_ids)
        np.testing.assert_array_equal(sequence.target_ids, item.rollout.response_ids)
        np.testing.assert_array_equal(sequence.target_mask, item.rollout.response_mask)
        np.testing.assert_array_equal(
            sequence.streams["sampled_logprobs"], item.rollout.sampled_logprobs
        )
        np.testing.assert_array_equal(sequence.streams["ref_logprobs"], item.ref_logprobs)
        assert (sequence.streams["advantages"] == np.float32(value)).all()


def test_a_rollout_without_trained_tokens_is_left_out_and_a_batch_of_them_refused() -> None:
    groups = [_group(0), _group(1, mask=[0, 0, 0])]
    batch = training_batch(
        groups, _advantages(groups, [1.0, 1.0]), version=0, drop_zero_advantages=False
    )
    assert (batch.num_left_out, batch.num_tokens) == (1, [3, 0])
    with pytest.raises(RecordError, match="no trained token"):
        training_batch(
            groups[1:], _advantages(groups[1:], [1.0]), version=0, drop_zero_advantages=False
        )


def test_mixed_or_greedy_temperatures_are_refused() -> None:
    groups = [_group(0, temperature=1.0), _group(1, temperature=0.7)]
    with pytest.raises(RecordError, match=r"\[0\.7, 1\.0\]"):
        training_batch(
            groups, _advantages(groups, [1.0, 1.0]), version=0, drop_zero_advantages=True
        )
    greedy = [_group(0, temperature=0.0)]
    with pytest.raises(RecordError, match="greedy"):
        training_batch(greedy, _advantages(greedy, [1.0]), version=0, drop_zero_advantages=True)


def test_a_reference_for_some_rollouts_only_is_refused() -> None:
    groups = [_group(0, ref_logprobs=[-1, -1, -1]), _group(1)]
    with pytest.raises(RecordError, match="1/0 has no ref_logprobs"):
        training_batch(
            groups, _advantages(groups, [1.0, 1.0]), version=0, drop_zero_advantages=True
        )


def test_advantages_of_another_shape_are_refused() -> None:
    groups = [_group(0)]
    with pytest.raises(RecordError, match="0/0"):
        training_batch(groups, [[np.zeros(2, np.float32)]], version=0, drop_zero_advantages=True)
    doubled = replace(groups[0], scored=groups[0].scored * 2)
    with pytest.raises(ValueError, match="zip"):
        training_batch([doubled], [[np.zeros(3, np.float32)]], version=0, drop_zero_advantages=True)
