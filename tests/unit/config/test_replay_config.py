"""What `[buffer.replay]` refuses, and why, in words."""

from typing import Any

import pytest

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.planning.placement import derived
from rlhf_cluster.run.checkpoint.resume import (
    FIXED,
    differences,
)
from tests.support.builders.run_configs import (
    tiny_config,
    tiny_tree,
)

PRIORITY = {"priority": "reward_spread"}
ONLINE_DPO = {"algorithm": {"type": "online_dpo", "group_size": 4}, "scoring": {"reference": True}}


def sections(replay: dict[str, Any], **changes: Any) -> dict[str, Any]:
    buffer = {"replay": replay, **changes.pop("buffer", {})}
    return {"staleness": {"max_staleness": 2}, "buffer": buffer, **changes}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        (sections({}, buffer={"durable": False}), ["buffer.durable = false", "from their files"]),
        (
            sections({}, staleness={"max_staleness": 0, "pipeline_depth": 0}),
            ["staleness.max_staleness = 0", "a step older", "Allow staleness"],
        ),
        (
            sections({}, algorithm={"correction": {"type": "none"}}),
            ["algorithm.type = 'grpo'", "correction = 'none'", "'token_tis'"],
        ),
        (sections({}, **ONLINE_DPO), ["'online_dpo', which has no off-policy correction"]),
        (sections({"max_uses": 1}), ["buffer.replay.max_uses", "found 1"]),
        (sections({"fraction": 1.0}), ["buffer.replay.fraction", "found 1.0"]),
        (  # 4 groups a step
            sections({"fraction": 0.1}),
            ["0.1 of run.groups_per_step = 4 is 0 replayed groups and 4 fresh", "one of each"],
        ),
        (sections({"fraction": 0.9}), ["is 4 replayed groups and 0 fresh ones"]),
        (
            sections({"fraction": 0.5}, learner={"ranks": 3, "minibatches": 3}),
            ["their 8 rollouts are under learner.ranks * learner.minibatches = 3 * 3"],
        ),
        (sections({"alpha": 0.7}), ["buffer.replay.alpha = 0.7", "priority = 'uniform'"]),
        (
            sections(PRIORITY, algorithm={"type": "reinforce", "group_size": 1}),
            ["algorithm.group_size = 1", "no spread"],
        ),
        (  # 3 fresh groups a step: (2 + 1 - 1) * 3 + 1 = 7
            sections({}, staleness={"max_staleness": 2, "look_ahead": 8}),
            ["look_ahead = 8 is over 7", "the fresh groups of a step", "(2 + 1 - 1) * 3 + 1"],
        ),
    ],
)
def test_what_cannot_hold_is_refused_with_values_and_cure(changed, words):
    with pytest.raises(ConfigError) as error:
        validate(RunConfig, tiny_tree(**changed), source="run.toml")
    assert not [word for word in words if word not in str(error.value)], str(error.value)


def test_b10_a_ratio_to_the_sampler_without_a_rule_may_replay():
    algorithm = {"proximal": "bypass", "correction": {"type": "none"}}
    config = validate(RunConfig, tiny_tree(**sections({}, algorithm=algorithm)), source="run.toml")
    assert config.buffer.replay is not None


def test_without_the_section_nothing_is_replayed_and_with_it_admission_follows_what_is_fresh():
    assert tiny_config().buffer.replay is None
    config = tiny_config(**sections({}))
    assert derived(config)["prompts"] == "9 (3 a step)"
    assert "(4 prompts x 4, 1 of them replayed)" in derived(config)["samples a step"]
    assert derived(tiny_config())["prompts"] == "12 (4 a step)"


def test_the_fraction_of_a_run_that_goes_on_is_fixed():
    before, after = (
        config.model_dump(mode="json") for config in (tiny_config(), tiny_config(**sections({})))
    )
    changes = differences(before, after)
    assert "buffer.replay.fraction = 0.25, was not set" in changes
    assert "buffer.replay.fraction" in FIXED
