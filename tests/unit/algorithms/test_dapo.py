"""DAPO's own parts: soft overlong punishment and overlong filtering, each a switch."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.algorithms.dapo import Dapo, DapoConfig
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.learner.step.training_batch import training_batch
from rlhf_cluster.records import ExperienceGroup, FinishReason
from tests.support.builders.tiny_learner import random_groups


def built(limit: int = 24, **keys: Any) -> Dapo:
    return Dapo(DapoConfig(group_size=4, **keys), limit)


def cut(groups: list[ExperienceGroup], which: set[str]) -> list[ExperienceGroup]:
    """The groups with some rollouts, by id, cut at the limit."""

    def of(scored: Any) -> Any:
        if scored.rollout.rollout_id not in which:
            return scored
        return replace(scored, rollout=replace(scored.rollout, finish_reason=FinishReason.LENGTH))

    return [replace(g, scored=tuple(of(s) for s in g.scored)) for g in groups]


def whole(scored: Any) -> Any:
    """The same rollout, every token of it trained."""
    mask = np.ones_like(scored.rollout.response_mask)
    return replace(scored, rollout=replace(scored.rollout, response_mask=mask))


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, 0.0), (16, 0.0), (17, -0.125), (20, -0.5), (24, -1.0), (30, -1.0)],
)
def test_the_punishment_falls_in_a_line_over_the_buffer(num_tokens: int, expected: float) -> None:
    assert built(24, overlong_buffer_tokens=8).overlong_punishment(num_tokens) == expected
    tripled = built(24, overlong_buffer_tokens=8, overlong_penalty=3.0)
    assert tripled.overlong_punishment(num_tokens) == 3 * expected
    assert built(24).overlong_punishment(num_tokens) == 0


def test_a_punished_answer_falls_behind_an_equal_shorter_one() -> None:
    groups = random_groups(0, num_groups=1, lengths=[10, 20, 24, 5], rewards=[1.0] * 4)
    groups = [replace(g, scored=tuple(map(whole, g.scored))) for g in groups]
    plain = built(24).advantages(groups)[0]
    assert all(np.all(a == 0) for a in plain)
    found = [a[0] for a in built(24, overlong_buffer_tokens=8).advantages(groups)[0]]
    rewards = np.array([1.0, 0.5, 0.0, 1.0])
    expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert groups[0].scored[1].reward == 1.0, "the record keeps what the scorers said"


def test_a_filtered_answer_is_in_no_loss_and_no_denominator_but_in_its_groups_mean() -> None:
    rewards = [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    groups = cut(random_groups(1, num_groups=2, rewards=rewards), {"0/1", "1/0"})
    algorithm = built(overlong_filter=True)
    advantages = algorithm.advantages(groups)
    kept = algorithm.trained_groups(groups)
    batch = training_batch(kept, advantages, 0, drop_zero_advantages=False)
    for index in (1, 4):
        assert batch.num_tokens[index] == 0
        assert batch.sequences[index] is None
    whole = training_batch(groups, advantages, 0, drop_zero_advantages=False)
    others = [i for i in range(8) if i not in (1, 4)]
    assert [batch.num_tokens[i] for i in others] == [whole.num_tokens[i] for i in others]
    unfiltered = built().advantages(groups)
    for g, arrays in enumerate(advantages):
        for i, array in enumerate(arrays):
            gone = (g, i) in {(0, 1), (1, 0)}
            np.testing.assert_array_equal(array, 0 * array if gone else unfiltered[g][i])
    assert groups[0].scored[1].rollout.response_mask.any(), "the record is untouched"


def test_without_the_switch_nothing_is_left_out() -> None:
    groups = cut(random_groups(2), {"0/0"})
    assert built().trained_groups(groups) == groups


def test_a_step_of_cut_answers_only_has_no_gradient_and_does_not_end_the_run() -> None:
    groups = random_groups(3, num_groups=1)
    groups = cut(groups, {s.rollout.rollout_id for s in groups[0].scored})
    algorithm = built(overlong_filter=True)
    batch = training_batch(
        algorithm.trained_groups(groups), algorithm.advantages(groups), 0, drop_zero_advantages=True
    )
    assert batch.sequences == [None] * 4
    assert sum(batch.num_tokens) > 0


def test_a_buffer_without_a_limit_to_end_at_is_refused() -> None:
    config = DapoConfig(group_size=4, overlong_buffer_tokens=8)
    with pytest.raises(ConfigError, match="overlong_buffer_tokens = 8"):
        Dapo(config).advantages(random_groups(0))
