"""ReMax: the greedy reward as baseline."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.algorithms.remax import Remax, RemaxConfig
from rlhf_cluster.algorithms.rloo import Rloo, RlooConfig
from rlhf_cluster.errors import RecordError
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    make_group,
    make_prompt,
    make_scored,
    random_groups,
)


def test_every_token_has_its_reward_less_the_greedy_one() -> None:
    prompt = make_prompt(0, [3])
    scored = [
        make_scored("0/0", prompt, [7, 8], [-1.0, -1.0], 1.0, ref_logprobs=[-3.0, -1.5]),
        make_scored("0/1", prompt, [7], [-1.0], 0.25, ref_logprobs=[-1.0]),
    ]
    groups = [replace(make_group(0, prompt, scored), greedy_reward=0.75)]
    (found,) = Remax(RemaxConfig()).advantages(groups)
    np.testing.assert_allclose(found[0], [0.25, 0.25])
    np.testing.assert_allclose(found[1], [-0.5])
    # k1 of the first response is 2 + 0.5, of the second 0; the baseline pays none
    config = RemaxConfig(kl_coef=0.1, kl_in="reward")
    (found,) = Remax(config).advantages(groups)
    np.testing.assert_allclose(found[0], [0, 0], atol=1e-7)
    np.testing.assert_allclose(found[1], [-0.5])


def test_s18_a_group_without_a_greedy_reward_is_refused_and_not_given_a_zero() -> None:
    with pytest.raises(RecordError, match="no greedy reward"):
        Remax(RemaxConfig()).advantages(random_groups(0, num_groups=1))


def test_only_remax_asks_for_a_greedy_answer() -> None:
    assert Remax(RemaxConfig()).needs_greedy
    assert not Rloo(RlooConfig()).needs_greedy
    assert tiny_config(algorithm={"type": "remax", "group_size": 2}).sampling.greedy_baseline
    assert not tiny_config().sampling.greedy_baseline


def test_s9_a_step_trains_the_rollouts_and_knows_nothing_of_the_greedy_answer(
    start_learner: Any,
) -> None:
    learner = start_learner(algorithm={"type": "remax", "group_size": 4})
    groups = [replace(g, greedy_reward=0.5) for g in random_groups(0)]
    metrics = learner.train_step(groups).metrics
    assert metrics["learner/rollouts"] == 16
    assert metrics["learner/grad_norm"] > 0
