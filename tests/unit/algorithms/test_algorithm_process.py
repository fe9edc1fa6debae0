"""Rewards of reasoning steps in the algorithms: advantages by hand, and what is refused."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.algorithms import ALGORITHMS, build_algorithm
from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError, RecordError
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.run_configs import tiny_tree
from tests.support.builders.tiny_learner import (
    make_group,
    make_prompt,
    make_scored,
    response_logprobs,
)

STEPS = {"type": "python", "name": "lines", "function": "a:b", "per_step": True}
OUTCOME = {"type": "exact_match"}


def built(
    algorithm: dict[str, Any], rewards: Sequence[dict[str, Any]] = (STEPS,), **sections: Any
) -> Any:
    tree = tiny_tree(scoring={"rewards": list(rewards), "reference": True}, **sections)
    tree["algorithm"] = {"group_size": 2, **algorithm}
    return build_algorithm(validate(RunConfig, tree, source="run.toml").algorithm, 8)


def group(
    rewards: Sequence[float],
    steps: Sequence[dict[int, float]],
    num_tokens: int = 5,
    mask: Sequence[bool] | None = None,
) -> ExperienceGroup:
    """Responses of equal length, each with its outcome reward and its step rewards by their end."""
    prompt = make_prompt(0, [1])
    scored = []
    for index, (reward, own) in enumerate(zip(rewards, steps, strict=True)):
        one = make_scored(
            f"0/{index}",
            prompt,
            list(range(num_tokens)),
            [-1.0] * num_tokens,
            reward + sum(own.values()),
            mask=mask,
            ref_logprobs=[-1.0] * num_tokens,
        )
        ends, values = np.array([*own], dtype=np.int32), np.array([*own.values()], dtype=np.float64)
        scored.append(replace(one, step_ends=ends, step_rewards=values))
    return make_group(0, prompt, scored)


def test_grpo_gives_the_published_formula_from_steps_alone() -> None:
    given = group([0, 0], [{1: 1.0, 4: 0.0}, {2: 1.0, 4: 2.0}])
    rewards = np.array([1.0, 0.0, 1.0, 2.0])
    a, b, c, d = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
    found = built({"type": "grpo", "advantage": "process"}).advantages([given])
    np.testing.assert_allclose(found[0][0], [a + b] * 2 + [b] * 3, rtol=1e-5)
    np.testing.assert_allclose(found[0][1], [c + d] * 3 + [d] * 2, rtol=1e-5)
    assert {x.dtype for x in found[0]} == {np.dtype(np.float32)}


def test_outcomes_and_steps_are_normalised_apart_and_added() -> None:
    given = group([100.0, 300.0], [{0: 0.1, 4: 0.2}, {4: 0.3}])
    algorithm = {"type": "grpo", "advantage": "process"}
    found = built(algorithm, [OUTCOME, STEPS]).advantages([given])[0]
    steps = built(algorithm).advantages([group([0, 0], [{0: 0.1, 4: 0.2}, {4: 0.3}])])[0]
    outcomes = built({"type": "grpo"}, [OUTCOME]).advantages([group([100.0, 300.0], [{}, {}])])[0]
    for one, of_steps, of_outcomes in zip(found, steps, outcomes, strict=True):
        assert abs(of_outcomes[0]) == pytest.approx(0.5**0.5, rel=1e-3)
        np.testing.assert_allclose(one, of_steps + of_outcomes, rtol=1e-5)


def test_rounding_of_the_total_is_no_outcome() -> None:
    """Totals are sums of floats; what is left after the steps is noise, and must not be scaled up."""
    steps = [{i: 0.1 * (i + k) * 1000 for i in range(5)} for k in range(2)]
    given = group([0, 0], steps)
    given = replace(
        given,
        scored=tuple(
            replace(s, reward=s.reward * (1 + 2e-16 * (-1) ** i))
            for i, s in enumerate(given.scored)
        ),
    )
    algorithm = built({"type": "grpo", "advantage": "process"})
    found, exact = (algorithm.advantages([g])[0] for g in (given, group([0, 0], steps)))
    for one, other in zip(found, exact, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


@pytest.mark.parametrize("name", ["dapo", "cispo", "sapo", "dr_grpo"])
def test_the_other_algorithms_of_the_family_take_steps_alike(name: str) -> None:
    given = group([0, 0], [{1: 1.0, 4: 0.0}, {2: 1.0, 4: 2.0}])
    found = built({"type": name, "advantage": "process"}).advantages([given])[0]
    keys = {"normalize_std": name != "dr_grpo"}
    expected = built({"type": "grpo", "advantage": "process", **keys}).advantages([given])[0]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_a_rollout_without_step_rewards_is_named() -> None:
    given = group([0, 0], [{1: 1.0}, {2: 1.0}])
    bare = replace(given.scored[1], step_ends=None, step_rewards=None)
    with pytest.raises(RecordError, match="rollout 0/1 has no step rewards"):
        built({"type": "grpo", "advantage": "process"}).advantages(
            [replace(given, scored=(given.scored[0], bare))]
        )


def test_the_step_rewards_of_ppo_lie_where_their_steps_end() -> None:
    # the step that ends at token 3, which is not trained, is credited to token 1; none is before 0
    mask = [False, True, False, False, True]
    given = group([10.0], [{0: 5.0, 3: 1.0, 4: 2.0}], mask=mask)
    algorithm = built({"type": "ppo", "trace": 0.0, "whiten": False, "group_size": 1})
    values = [[np.zeros(5)]]
    advantages, _ = algorithm.estimate([given], values)
    np.testing.assert_allclose(advantages[0][0], [0, 1.0, 0, 0, 12.0])


def test_the_returns_of_reinforce_pp_are_the_steps_from_each_token_onward() -> None:
    given = group([10.0, 0.0], [{1: 1.0, 4: 2.0}, {0: 4.0}])
    for baseline, mean in (("none", 0.0), ("group", (13 + 4) / 2)):
        algorithm = built({"type": "reinforce_pp", "baseline": baseline})
        to_go = np.array([[13.0, 13, 12, 12, 12], [4.0, 0, 0, 0, 0]]) - mean
        expected = (to_go - to_go.mean()) / to_go.std()
        found = algorithm.advantages([given])[0]
        np.testing.assert_allclose(np.array(found), expected, rtol=1e-5)


def test_the_learner_tells_equal_totals_apart_by_their_steps(start_learner: Any) -> None:
    """A good step and a bad one in both answers: only the tokens of the second steps are told apart."""
    prompt = make_prompt(0, [2, 9])
    scored = []
    for index, steps in enumerate(([1.0, 0.0], [0.0, 1.0])):
        ids = [10 * index + i for i in range(8)]
        one = make_scored(f"0/{index}", prompt, ids, [-3.8] * 8, 1.0)
        ends = np.array([3, 7], np.int32)
        scored.append(replace(one, step_ends=ends, step_rewards=np.array(steps)))
    groups = [make_group(0, prompt, scored)]
    learner = start_learner(
        algorithm={"type": "grpo", "group_size": 2, "advantage": "process"},
        scoring={"rewards": [STEPS]},
        learner={"learning_rate": 1e-3},
        staleness={"max_staleness": 9},
    )
    before = response_logprobs(learner, groups)
    for _ in range(4):
        learner.train_step(groups)
    change = [b - a for a, b in zip(before, response_logprobs(learner, groups), strict=True)]
    assert change[1][4:].mean() > change[0][4:].mean() + 0.5
    outcome = start_learner(algorithm={"type": "grpo", "group_size": 2})
    assert outcome.train_step(groups).metrics["learner/grad_norm"] == 0


TAKES_STEPS = {"ppo", "reinforce_pp"}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_that_would_lose_the_place_of_a_step_refuses_it_with_the_reason(
    name: str,
) -> None:
    if name in TAKES_STEPS:
        assert built({"type": name}).config.no_steps is None
        return
    with pytest.raises(ConfigError) as error:
        built({"type": name})
    assert f"'lines' scores reasoning steps, with algorithm.type = '{name}': " in str(error.value)
    if name in {"grpo", "dapo", "dr_grpo", "cispo", "sapo"}:
        assert "advantage = 'outcome'" in str(error.value)
        assert built({"type": name, "advantage": "process"}).config.no_steps is None


@pytest.mark.parametrize(
    ("algorithm", "rewards", "words"),
    [
        ({}, [OUTCOME], "algorithm.advantage = 'process' and no reward in scoring.rewards"),
        (
            {"kl_coef": 0.1, "kl_in": "reward"},
            [STEPS],
            "kl_in = 'reward' with advantage = 'process'",
        ),
        (
            {"type": "dapo", "overlong_buffer_tokens": 4},
            [STEPS],
            "overlong_buffer_tokens = 4 with advantage = 'process'",
        ),
    ],
)
def test_what_would_be_normalised_alone_or_is_not_there_is_refused(
    algorithm: dict[str, Any], rewards: list[dict[str, Any]], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        built({"type": "grpo", "advantage": "process", **algorithm}, rewards)
    assert words in str(error.value)


def test_the_record_checks_its_steps_and_its_summary_carries_them() -> None:
    given = group([1.0, 0.0], [{1: 1.0, 4: 0.5}, {}])
    scored = given.scored[0]
    assert (scored.reward, scored.outcome_reward) == (2.5, 1.0)
    for changes in (
        {"step_rewards": None},
        {"step_ends": np.array([1, 5], np.int32)},
        {"step_ends": np.array([4, 1], np.int32)},
        {"step_ends": np.array([1], np.int32)},
        {"step_rewards": np.array([1.0, np.nan])},
        {"step_rewards": np.array([1.0, 1.0], np.float32)},
    ):
        with pytest.raises(RecordError):
            replace(scored, **changes)
    summary = pickle.loads(pickle.dumps(given)).summary()
    assert (summary.rewards, summary.step_rewards) == ((2.5, 0.0), (1.0, 0.5))
