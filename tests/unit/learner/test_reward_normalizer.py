"""Running normalisation of parts of the reward, against numpy over all that was seen."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rlhf_cluster.errors import ConfigError, RecordError
from rlhf_cluster.learner.reward_normalizer import (
    EPSILON,
    Joined,
    Moments,
    RunningNormalizer,
)
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    make_group,
    make_prompt,
    make_scored,
)

WEIGHTS = {"a": 2.0, "b": 0.5, "c": -1.0}


def step(seed: int, groups: int = 2, size: int = 3) -> list[ExperienceGroup]:
    draw = np.random.default_rng(seed)
    made = []
    for number in range(groups):
        prompt = make_prompt(number, [3])
        scored = []
        for i in range(size):
            parts = {"a": draw.normal(5, 2), "b": 1e6 + draw.normal(), "c": draw.normal()}
            reward = sum(WEIGHTS[name] * part for name, part in parts.items())
            one = make_scored(f"{number}/{i}", prompt, [7], [-1.0], reward)
            scored.append(replace(one, reward_parts=parts, watched={"a.0": 1.0}))
        made.append(make_group(number, prompt, scored))
    return made


def parts(groups, name: str) -> list[float]:
    return [scored.reward_parts[name] for group in groups for scored in group.scored]


def rewards(groups) -> list[float]:
    return [scored.reward for group in groups for scored in group.scored]


def test_the_moments_are_those_of_all_numbers_so_far():
    draw = np.random.default_rng(0)
    numbers = 1e5 + draw.normal(size=100)
    moments = Moments()
    for batch in np.split(numbers, [1, 3, 3, 40]):
        moments = moments.with_more(batch)
    assert moments.count == 100
    np.testing.assert_allclose([moments.mean, moments.std], [numbers.mean(), numbers.std()], 1e-9)
    assert Moments().std == 0.0


def test_rewards_are_made_of_parts_normalised_by_all_steps_so_far():
    normalizer = RunningNormalizer(WEIGHTS, ["a", "b"])
    seen = []
    for seed in range(3):
        groups = step(seed)
        seen += groups
        found = normalizer.apply(groups)
        expected = WEIGHTS["c"] * np.array(parts(groups, "c"))
        for name in ("a", "b"):
            every, own = np.array(parts(seen, name)), np.array(parts(groups, name))
            expected += WEIGHTS[name] * (own - every.mean()) / (every.std() + EPSILON)
        np.testing.assert_allclose(rewards(found), expected, rtol=1e-6, atol=1e-8)
        assert [s.reward_parts for g in found for s in g.scored] == [
            s.reward_parts for g in groups for s in g.scored
        ]
    metrics = normalizer.metrics()
    assert metrics["reward/running_mean/a"] == pytest.approx(np.mean(parts(seen, "a")))
    assert metrics["reward/running_std/b"] == pytest.approx(np.std(parts(seen, "b")))


def test_what_is_trained_again_is_not_counted_again():
    normalizer = RunningNormalizer(WEIGHTS, ["a"])
    first = step(0)
    normalizer.apply(first)
    before = normalizer.state()
    again = [replace(group, uses=1) for group in first]
    fresh = step(1)
    rewarded = normalizer.apply([*fresh, *again])[len(fresh) :]
    once = RunningNormalizer(WEIGHTS, ["a"])
    once.load_state(before)
    assert once.apply(fresh) is not fresh
    assert normalizer.state() == once.state()
    assert rewards(rewarded) != rewards(normalizer.apply(step(2)))


def test_a_state_that_is_loaded_goes_on_as_if_nothing_had_happened():
    def normalizer() -> RunningNormalizer:
        return RunningNormalizer(WEIGHTS, ["a", "b"])

    whole, first, second = normalizer(), normalizer(), normalizer()
    for one in (whole, first):
        one.apply(step(0))
        one.apply(step(1))
    kept = json.loads(json.dumps(Joined(first).state()))
    Joined(second).load_state(kept)
    assert rewards(second.apply(step(2))) == rewards(whole.apply(step(2)))


def test_equal_scores_are_nought_and_without_a_part_nothing_is_changed():
    groups = step(0, groups=1, size=1)
    [found] = RunningNormalizer(WEIGHTS, ["a", "b", "c"]).apply(groups)
    assert [s.reward for s in found.scored] == [0.0]
    untouched = RunningNormalizer(WEIGHTS, [])
    assert untouched.apply(groups) is groups
    assert untouched.metrics() == untouched.state() == {}


def test_a_rollout_with_other_parts_is_refused():
    with pytest.raises(RecordError, match=r"has the parts \['a', 'b', 'c'\], scoring.rewards has"):
        RunningNormalizer({"a": 1.0, "d": 1.0}, ["a"]).apply(step(0))


def test_states_of_several_are_one():
    class Kept:
        def __init__(self, name: str) -> None:
            self.name, self.loaded = name, {}

        def state(self) -> dict[str, float]:
            return {self.name: 1.0}

        def load_state(self, state: dict[str, float]) -> None:
            self.loaded = state

    parts = Kept("kl"), Kept("normalize")
    joined = Joined(*parts)
    assert joined.state() == {"kl": 1.0, "normalize": 1.0}
    joined.load_state({"kl": 2.0, "normalize": 3.0})
    assert all(part.loaded == {"kl": 2.0, "normalize": 3.0} for part in parts)


RUNNING = {"type": "exact_match", "name": "a", "normalize": "running"}


def configured(*others, objective=None, **sections):
    scoring = {"rewards": [RUNNING, *others]} | (
        {} if objective is None else {"objective": objective}
    )
    return tiny_config(scoring=scoring, **sections)


def test_a_run_normalises_what_its_file_says_and_nothing_that_is_watched():
    watched = {"type": "numeric", "name": "w", "watch": True}
    config = configured({"type": "numeric", "name": "b", "weight": 3.0}, watched)
    normalizer = RunningNormalizer.of(config.scoring)
    assert set(normalizer.state()) == {f"normalize/a/{f}" for f in ("count", "mean", "squares")}
    assert normalizer._weights == {"a": 1.0, "b": 3.0}


@pytest.mark.parametrize(
    ("objective", "sections", "text"),
    [
        ({"type": "constrained", "floors": {"a": 1.0}}, {}, "in the unit of scores"),
        (None, {"algorithm": {"type": "gdpo"}}, "normalises every reward by itself"),
        (None, {"algorithm": {"type": "remax"}}, "takes off the reward of a greedy answer"),
    ],
)
def test_what_would_not_fit_is_refused(objective, sections, text):
    with pytest.raises(ConfigError, match=text):
        configured(objective=objective, **sections)


def test_what_is_watched_cannot_be_normalised():
    with pytest.raises(ConfigError, match=r"normalize = 'running' with watch = true"):
        configured({"type": "numeric", "normalize": "running", "watch": True})
