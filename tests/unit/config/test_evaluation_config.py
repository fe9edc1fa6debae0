"""What `[evaluation]` means and refuses, and why, in words."""

from typing import Any

import pytest

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.errors import ConfigError
from tests.support.builders.evaluation_example import examples
from tests.support.builders.run_configs import tiny_config, tiny_tree

TASK = {"name": "a", "num_prompts": 4}


def without_task(tree: dict[str, Any]) -> dict[str, Any]:
    return {**tree, "data": {key: v for key, v in tree["data"].items() if key != "task"}}


def sets(*given: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"evaluation": {"sets": list(given), **rest}}


def test_the_keys_of_before_and_after_mean_one_set() -> None:
    [of] = tiny_config(evaluation={"num_prompts": 8}).evaluation.all_sets
    assert (of.name, of.num_prompts, of.every, of.samples) == ("held_out", 8, 0, 1)
    assert (of.temperature, of.skip_first, of.rewards) == (0.0, False, [])
    assert tiny_config(evaluation={"num_prompts": 0}).evaluation.all_sets == ()
    both = tiny_config(**sets(TASK, num_prompts=8)).evaluation.all_sets
    assert [each.name for each in both] == ["held_out", "a"]


def test_the_examples_of_the_page_are_valid() -> None:
    first, second = examples()
    assert len(tiny_config(**first).evaluation.all_sets) == 2
    made = validate(RunConfig, without_task(tiny_tree(**second)), "the page")
    [rest] = made.evaluation.all_sets
    assert rest.data is not None
    assert rest.data.skip_rows == second["data"]["limit"]


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        (sets(TASK, TASK), ["2 sets are named 'a'", "Rename one"]),
        (
            sets({**TASK, "name": "held_out"}, num_prompts=2),
            ["2 sets are named 'held_out'", "evaluation.num_prompts makes one"],
        ),
        (sets({"name": "A b"}), ["evaluation.sets.0.name", "found 'A b'"]),
        (sets({"name": "a"}), ["the set 'a' is of the task 'sort_digits'", "Give it num_prompts"]),
        (
            {"data": {"path": "x.jsonl"}, **sets({"name": "a"}, num_prompts=0)},
            ["the set 'a' has no data", "data.path = 'x.jsonl'", "set evaluation.path"],
        ),
        (sets({**TASK, "samples": 2}), ["samples = 2 with", "temperature = 0", "all the same"]),
        (sets({**TASK, "data": {}}), ["task and path: neither given"]),
        (
            sets({**TASK, "data": {"task": "sort_digits", "skip_rows": 2}}),
            ["skip_rows = 2 with", "task = 'sort_digits'"],
        ),
        (
            sets({**TASK, "max_response_tokens": 9999}),
            ["max_response_tokens = 9999, over", "Lower"],
        ),
        (sets({**TASK, "rewards": ["judge"]}), ["names the reward 'judge'", "watch = true"]),
        (
            sets({**TASK, "every": 2}, hold_s=600.0),
            ["evaluation.hold_s = 600 is not under half of run.stall_timeout_s", "Lower hold_s"],
        ),
    ],
)
def test_what_cannot_be_evaluated_is_refused(sections: dict[str, Any], words: list[str]) -> None:
    tree = tiny_tree(**sections)
    tree = without_task(tree) if "path" in tree["data"] else tree
    with pytest.raises(ConfigError) as refused:
        validate(RunConfig, tree, "a file")
    for word in words:
        assert word in str(refused.value)
