"""What `[staleness]` refuses, and why, in words."""

import pytest

from rlhf_cluster.config import RunConfig, load_run, validate
from rlhf_cluster.errors import ConfigError
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)

ADAPTIVE = {"max_staleness": 2, "adaptive": {}}
REWEIGHT = {"on_stale": "reweight", "stale_limit": 2}


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (
            {"weights": {"publish_every": 4}},
            ["weights.publish_every = 4", "staleness.max_staleness + 1 = 2", "Publish more often"],
        ),
        (  # 4 groups a step: (1 + 1 - 1) * 4 + 1 = 5
            {"staleness": {"look_ahead": 6}},
            ["staleness.look_ahead = 6 is over 5", "(1 + 1 - 1) * 4 + 1", "no bound at all"],
        ),
        ({"staleness": {"look_ahead": 1_000_000}}, ["order of their completion"]),
        (
            {"staleness": {"look_ahead": 2}, "weights": {"publish_every": 2}},
            ["staleness.look_ahead = 2 is over 1"],
        ),
        ({"staleness": {"look_ahead": 0}}, ["staleness.look_ahead", "found 0"]),
        (
            {"staleness": {"max_staleness": 0, "on_stale": "drop"}},
            ["on_stale = 'drop'", "max_staleness = 0", "on-policy"],
        ),
        (
            {"staleness": {"max_staleness": 0, "on_stale": "reweight", "stale_limit": 2}},
            ["on_stale = 'reweight'", "max_staleness = 0"],
        ),
        (
            {"staleness": {"on_stale": "drop", "look_ahead": 2}},
            ["on_stale = 'drop'", "look_ahead = 2", "long answers"],
        ),
        (
            {"staleness": {"stale_limit": 3}},
            ["stale_limit = 3", "on_stale = 'wait'", "Remove it"],
        ),
        (
            {"staleness": {"on_stale": "reweight"}},
            ["staleness.stale_limit over", "max_staleness = 1, found None"],
        ),
        (
            {"staleness": {"on_stale": "reweight", "stale_limit": 1}},
            ["max_staleness = 1, found 1"],
        ),
        (
            {"staleness": REWEIGHT, "algorithm": {"correction": {"type": "none"}}},
            ["algorithm.correction other than 'none'", "importance weights", "'bypass'"],
        ),
        (
            {"staleness": REWEIGHT, "algorithm": {"type": "online_dpo", "group_size": 2}},
            ["needs importance weights"],
        ),
        (
            {"staleness": {"max_staleness": 1, "pipeline_depth": 2, "adaptive": {}}},
            ["pipeline_depth = 2", "max_staleness = 1"],
        ),
        (
            {"staleness": {"max_staleness": 0, "pipeline_depth": 0, "adaptive": {}}},
            ["max_staleness = 0"],
        ),
        (
            {"staleness": ADAPTIVE | {"adaptive": {"ess_low": 0.9}}},
            ["ess_low = 0.9", "ess_high = 0.8"],
        ),
        ({"staleness": {"on_stale": "hope"}}, ["staleness.on_stale", "found 'hope'"]),
    ],
)
def test_what_cannot_hold_is_refused_with_values_and_cure(sections, words):
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tiny_tree(**sections), source="run.toml")
    assert not [word for word in words if word not in str(error.value)], str(error.value)


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ({"look_ahead": 5}, 1),
        ({"on_stale": "drop"}, 1),
        (REWEIGHT, 2),
        (ADAPTIVE, 2),
        ({"max_staleness": 0}, 0),
    ],
)
def test_what_can_hold_is_accepted_with_its_bound(settings, bound):
    assert tiny_config(staleness=settings).staleness.bound == bound


def test_an_empty_section_turns_the_adaptive_depth_on():
    config = load_run("configs/quickstart.toml", ["staleness.adaptive={}"])
    assert config.staleness.adaptive is not None
    assert config.staleness.adaptive.steps == 4


@pytest.mark.parametrize("kind", ["grpo", "gspo", "cispo"])
def test_l12_a_ratio_to_the_sampler_weighs_stale_groups_without_a_correction(kind):
    algorithm = {"type": kind, "proximal": "bypass", "correction": {"type": "none"}}
    assert tiny_config(staleness=REWEIGHT, algorithm=algorithm).staleness.bound == 2
