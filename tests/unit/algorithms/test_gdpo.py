"""GDPO: rewards normalised apart, then together."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rlhf_cluster.algorithms import build_algorithm
from rlhf_cluster.algorithms.gdpo import Gdpo, GdpoConfig
from rlhf_cluster.algorithms.grpo import Grpo, GrpoConfig
from rlhf_cluster.errors import ConfigError, RecordError
from rlhf_cluster.records import ExperienceGroup
from tests.support.builders.run_configs import tiny_config
from tests.support.builders.tiny_learner import (
    make_group,
    make_prompt,
    make_scored,
)


def _groups(parts: list[list[dict[str, float]]]) -> list[ExperienceGroup]:
    groups = []
    for number, own in enumerate(parts):
        prompt = make_prompt(number, [3])
        scored = [
            replace(
                make_scored(
                    f"{number}/{i}", prompt, [7] * (i + 1), [-1.0] * (i + 1), sum(p.values())
                ),
                reward_parts=p,
            )
            for i, p in enumerate(own)
        ]
        groups.append(make_group(number, prompt, scored))
    return groups


def _slow(groups: list[ExperienceGroup], weights: dict[str, float]) -> list[float]:
    sums = []
    for group in groups:
        size = len(group.scored)
        for scored in group.scored:
            total = 0.0
            for name, weight in weights.items():
                values = [s.reward_parts[name] for s in group.scored]
                mean = sum(values) / size
                deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (size - 1))
                if max(values) > min(values):
                    total += weight * (scored.reward_parts[name] - mean) / (deviation + 1e-4)
            sums.append(total)
    mean = sum(sums) / len(sums)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in sums) / len(sums))
    return [(s - mean) / deviation for s in sums]


def test_advantages_are_the_slow_loop_and_one_a_response() -> None:
    draw = np.random.default_rng(0)
    parts = [
        [{"right": float(draw.integers(2)), "short": 100 * draw.random()} for _ in range(4)]
        for _ in range(3)
    ]
    groups = _groups([*parts, [{"right": 1.0, "short": 5.0}] * 3])
    config = GdpoConfig(reward_weights={"short": 0.5})
    found = [a for group in Gdpo(config).advantages(groups) for a in group]
    expected = _slow(groups, {"right": 1.0, "short": 0.5})
    for own, value in zip(found, expected, strict=True):
        np.testing.assert_allclose(own, np.full(len(own), value), rtol=1e-5, atol=1e-6)
    assert all((own == 0).all() for own in found[-3:]), "a group of equal rewards is left out"


def test_the_scale_of_a_reward_does_not_matter_and_that_of_a_sum_does() -> None:
    small = [[{"right": r, "short": s} for r, s in ((1, 0.2), (0, 0.9), (1, 0.4), (0, 0.1))]]
    large = [[{**p, "short": 1000 * p["short"]} for p in small[0]]]
    gdpo, grpo = Gdpo(GdpoConfig()), Grpo(GrpoConfig())
    one, other = (np.concatenate(gdpo.advantages(_groups(p))[0]) for p in (small, large))
    np.testing.assert_allclose(one, other, atol=1e-3)
    one, other = (np.concatenate(grpo.advantages(_groups(p))[0]) for p in (small, large))
    assert np.abs(one - other).max() > 0.5


def test_rewards_that_are_missing_or_unknown_are_refused() -> None:
    groups = _groups([[{"right": 1.0}, {"left": 1.0}]])
    with pytest.raises(RecordError, match="every rollout needs exactly these"):
        Gdpo(GdpoConfig()).advantages(groups)
    settings: dict[str, Any] = {"type": "gdpo", "reward_weights": {"exact": 1.0}}
    with pytest.raises(ConfigError, match="names 'exact', and scoring.rewards has 'exact_match'"):
        tiny_config(algorithm=settings)
    with pytest.raises(ConfigError, match="kl_in = 'reward' with type = 'gdpo'"):
        tiny_config(algorithm={"type": "gdpo", "kl_coef": 0.1, "kl_in": "reward"})
    settings["reward_weights"] = {"exact_match": 2.0}
    assert tiny_config(algorithm=settings).algorithm.type == "gdpo"


def rewards(*given: dict[str, Any]) -> dict[str, Any]:
    return {"rewards": [{"type": "exact_match", **one} for one in given]}


def test_l04_a_cost_without_a_weight_of_its_own_is_lowered() -> None:
    scoring = rewards(
        {"name": "right"},
        {"name": "cost", "weight": -0.5},
        {"name": "seen", "weight": 3.0, "watch": True},
    )
    groups = _groups([[{"right": 1.0, "cost": c} for c in (1.0, 2.0, 3.0, 4.0)]])
    config = tiny_config(algorithm={"type": "gdpo"}, scoring=scoring)
    settings = config.trained_algorithm
    assert isinstance(settings, GdpoConfig)
    assert settings.reward_weights == {"right": 1.0, "cost": -0.5}
    values = [own[0] for own in build_algorithm(settings, 8).advantages(groups)[0]]
    assert values == sorted(values, reverse=True)
    assert values[0] > 0 > values[-1]


def test_l04_a_learner_trains_with_the_weights_of_the_rewards(start_learner: Any) -> None:
    learner = start_learner(
        algorithm={"type": "gdpo", "group_size": 4},
        scoring=rewards({"name": "cost", "weight": -2.0}),
    )
    assert learner._algorithm.config.reward_weights == {"cost": -2.0}


@pytest.mark.parametrize(("weight", "own"), [(-1.0, 1.0), (1.0, -1.0), (1.0, 0.0), (-0.5, 1e-3)])
def test_l04_a_sign_that_contradicts_the_reward_is_refused(weight: float, own: float) -> None:
    with pytest.raises(
        ConfigError, match=f"reward_weights.part = {own:g} with weight = {weight:g}"
    ):
        tiny_config(
            algorithm={"type": "gdpo", "reward_weights": {"part": own}},
            scoring=rewards({"name": "part", "weight": weight}),
        )


def test_l04_weights_of_the_same_sign_are_those_of_the_algorithm() -> None:
    config = tiny_config(
        algorithm={"type": "gdpo", "reward_weights": {"cost": -3.0}},
        scoring=rewards({"name": "right", "weight": 2.0}, {"name": "cost", "weight": -1.0}),
    )
    settings = config.trained_algorithm
    assert isinstance(settings, GdpoConfig)
    assert settings.reward_weights == {"right": 2.0, "cost": -3.0}
    assert tiny_config().trained_algorithm == tiny_config().algorithm
