"""How the parts of a reward become one number, by hand; and what a run file may ask of them."""

import pytest

from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.combination import (
    Constrained,
    Lexicographic,
    WeightedSum,
)
from tests.support.builders.run_configs import tiny_config

WEIGHTS = {"help": 2.0, "safe": 0.0, "style": 0.5}
PARTS = {"help": 3.0, "safe": 0.25, "style": -1.0}


def test_every_part_counts_by_its_weight():
    assert WeightedSum().count_parts(PARTS, WEIGHTS) == {"help": 6.0, "safe": 0.0, "style": -0.5}


@pytest.mark.parametrize(
    ("safe", "penalty"), [(0.25, 4.0 * 0.75), (1.0, 0.0), (1.5, 0.0), (-1.0, 8.0)]
)
def test_below_its_floor_each_unit_of_a_part_costs_the_coefficient(safe, penalty):
    objective = Constrained(floors={"safe": 1.0}, coef=4.0)
    counted = objective.count_parts({**PARTS, "safe": safe}, WEIGHTS)
    assert counted == {"help": 6.0, "safe": -penalty, "style": -0.5}


def test_a_part_with_a_floor_counts_by_its_weight_as_well():
    objective = Constrained(floors={"help": 3.5, "style": -2.0}, coef=10.0)
    assert objective.count_parts(PARTS, WEIGHTS) == {"help": 6.0 - 5.0, "safe": 0.0, "style": -0.5}


@pytest.mark.parametrize(
    ("safe", "help_", "expected"),
    [
        (0.9, 5.0, {"safe": 0.0, "help": 0.0, "style": 0.0}),
        (1.0, 4.9, {"safe": 0.0, "help": 9.8, "style": 0.0}),
        (1.0, 5.0, {"safe": 0.0, "help": 10.0, "style": 0.5}),
        (0.0, 9.0, {"safe": 0.0, "help": 0.0, "style": 0.0}),
    ],
)
def test_a_later_part_counts_where_all_before_it_reach_their_thresholds(safe, help_, expected):
    objective = Lexicographic(
        order=["safe", "help", "style"], thresholds={"safe": 1.0, "help": 5.0}
    )
    parts = {"help": help_, "safe": safe, "style": 1.0, "length": -3.0}
    counted = objective.count_parts(parts, {**WEIGHTS, "length": 1.0})
    assert counted == {**expected, "length": -3.0}, "what is not in the order always counts"


def configured(rewards, objective=None, **sections):
    scoring = {"rewards": rewards} | ({} if objective is None else {"objective": objective})
    return tiny_config(scoring=scoring, **sections)


HELP = {"type": "exact_match", "name": "help"}
SAFE = {"type": "numeric", "name": "safe"}
STEPS = {"type": "python", "name": "steps", "function": "m:f", "per_step": True}
FLOOR = {"type": "constrained", "floors": {"safe": 0.5}}
ORDER = {"type": "lexicographic", "order": ["safe", "help"], "thresholds": {"safe": 1.0}}


def test_what_a_run_file_may_ask():
    for objective in (None, {"type": "weighted_sum"}, FLOOR, ORDER):
        taken = configured([HELP, SAFE], objective).scoring.objective
        assert taken.type == (objective or {"type": "weighted_sum"})["type"]
    unweighted = configured([HELP, {**SAFE, "weight": 0.0}], FLOOR).scoring
    assert [reward.weight for reward in unweighted.rewards] == [1.0, 0.0]
    for watched, sections in ((SAFE, {}), (STEPS, {"algorithm": {"advantage": "outcome"}})):
        found = configured([HELP, {**watched, "watch": True}], **sections).scoring
        assert [reward.watch for reward in found.rewards] == [False, True]


@pytest.mark.parametrize(
    ("rewards", "objective", "sections", "text"),
    [
        ([{**HELP, "watch": True}], None, {}, "all have watch = true"),
        ([HELP, {**SAFE, "weight": 0.0}], None, {}, "'safe' has weight = 0.* Set watch = true"),
        ([HELP], FLOOR, {}, "scoring.objective names 'safe', and scoring.rewards has 'help'"),
        ([HELP, {**SAFE, "watch": True}], FLOOR, {}, "without what is only watched"),
        ([HELP, SAFE], {**ORDER, "order": ["help", "help"]}, {}, "names a reward twice"),
        ([HELP, SAFE], {**ORDER, "thresholds": {}}, {}, r"expected exactly \['safe'\]"),
        ([HELP, SAFE], {**FLOOR, "coef": 0.0}, {}, "greater than 0"),
        (
            [HELP, SAFE],
            FLOOR,
            {"algorithm": {"type": "gdpo"}},
            "makes one of the rewards by itself",
        ),
        (
            [HELP, SAFE, STEPS],
            ORDER,
            {"algorithm": {"advantage": "process"}},
            "'steps', which scores reasoning steps",
        ),
        ([{**HELP, "name": "a/b"}], None, {}, "pattern"),
        ([HELP, {**SAFE, "name": "help.unclipped"}], None, {}, "what the reward 'help' reports"),
        ([{**HELP, "clip": [1.0, 1.0]}], None, {}, "not below the second"),
        ([HELP, {**SAFE, "clip": [0, 1], "watch": True}], None, {}, "shown as it is"),
        ([HELP, {**STEPS, "clip": [0, 1]}], None, {}, "with a reward of steps: what it changes"),
    ],
)
def test_what_cannot_be_is_refused_with_its_cure(rewards, objective, sections, text):
    with pytest.raises(ConfigError, match=text):
        configured(rewards, objective, **sections)
