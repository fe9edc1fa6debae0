"""A user's Python function as a reward: the arguments it gets, and what becomes of its answer."""

import datetime
import math
from pathlib import Path

import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.programs.python_function import (
    PythonFunction,
    PythonFunctionConfig,
)
from rlhf_cluster.rewards.reward import RewardContext
from rlhf_cluster.rewards.reward_failure import (
    RewardFailure,
    check_step_scores,
)
from tests.support.builders.scored_groups import (
    make_prompt,
    make_rollouts,
)

MODULE = """
import json

def check(prompts, completions, answer, level, scale=1.0):
    expected = json.load(open("expected.json"))
    given = [prompts, completions, answer, level, scale]
    assert given == expected, given
    return [scale * len(str(c)) for c in completions]

def bad(prompts, completions, mode, **columns):
    if mode[0] == "one short":
        return [1.0] * (len(completions) - 1)
    return [{"none": None, "nan": float("nan"), "inf": float("inf"), "text": "1"}[mode[0]]] * 2

def by_step(prompts, completions, steps, answers, **columns):
    if answers[0] is None:
        return [[float(len(step)) for step in own] for own in steps]
    return answers[0]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "given_rewards.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def reward():
    made: list[PythonFunction] = []

    def make(name: str, **keys) -> PythonFunction:
        config = PythonFunctionConfig(function=f"given_rewards:{name}", **keys)
        made.append(PythonFunction(config, RewardContext()))
        return made[-1]

    yield make
    for one in made:
        one.close()


def score(reward, source, columns, *completions):
    prompt = make_prompt(source, columns)
    return reward.score(prompt, make_rollouts(prompt, [[5, 1]] * len(completions)), completions)


def test_text_prompts_come_as_texts_and_columns_once_a_rollout(reward, folder):
    (folder / "expected.json").write_text(
        '[["2 + 2 =", "2 + 2 ="], ["4", "five"], ["4", "4"], [[1], [1]], 0.5]'
    )
    columns = {"answer": "4", "level": [1]}
    found = score(reward("check", kwargs={"scale": 0.5}), "2 + 2 =", columns, "4", "five")
    assert found == [0.5, 2.0]


def test_chat_prompts_come_as_messages_and_completions_as_assistant_turns(reward, folder):
    (folder / "expected.json").write_text(
        '[[[{"role": "user", "content": "2 + 2?"}]], [[{"role": "assistant", "content": "4"}]],'
        ' ["4"], [null], 1.0]'
    )
    source = [{"role": "user", "content": "2 + 2?"}]
    found = score(reward("check"), source, {"answer": "4", "level": None}, "4")
    assert found == [float(len(str([{"role": "assistant", "content": "4"}])))]


def test_s23_each_unusable_answer_is_an_error_with_its_reason_and_never_a_zero(reward):
    bad = reward("bad")
    found = {}
    for mode in ("one short", "none", "nan", "inf", "text"):
        with pytest.raises(RewardFailure) as failure:
            score(bad, "?", {"mode": mode}, "a", "b")
        found[mode] = failure.value.reason
    assert found == {
        "one short": "length",
        "none": "none",
        "nan": "nan",
        "inf": "infinite",
        "text": "not_a_number",
    }


@pytest.mark.parametrize("value", [datetime.date(2026, 1, 1), b"bytes", {1, 2}])
def test_a_column_that_is_not_json_is_named(reward, value):
    with pytest.raises(RewardFailure, match="column 'level' cannot be handed") as failure:
        score(reward("check"), "?", {"answer": "4", "level": value}, "a")
    assert failure.value.reason == "column"


def test_a_column_never_replaces_an_argument_of_the_function(reward):
    with pytest.raises(RewardFailure, match="column 'prompts'"):
        score(reward("check"), "?", {"prompts": "x"}, "a")
    with pytest.raises(RewardFailure, match=r"column 'scale'.*also in kwargs"):
        score(reward("check", kwargs={"scale": 2.0}), "?", {"scale": 1.0}, "a")


def test_kwargs_that_cannot_be_handed_over_are_refused_before_anything_starts(reward):
    with pytest.raises(ConfigError, match=r"kwargs.since.*JSON"):
        reward("check", kwargs={"since": datetime.date(2026, 1, 1)})
    with pytest.raises(ConfigError, match=r"kwargs.prompts.*own"):
        reward("check", kwargs={"prompts": 1})


@pytest.mark.parametrize("function", ["given_rewards", "given_rewards:", "a b:c", ":f", "a:b.c"])
def test_a_function_is_written_as_module_and_name(function):
    with pytest.raises(ConfigError, match="function"):
        validate(PythonFunctionConfig, {"function": function}, source="test")


def score_steps(reward, answers, *steps):
    prompt = make_prompt("?", {"answers": answers})
    rollouts = make_rollouts(prompt, [[5, 1]] * len(steps))
    return reward.score_steps(prompt, rollouts, ["\n".join(own) for own in steps], steps)


def test_a_function_of_steps_gets_them_and_returns_a_list_for_each_completion(reward):
    found = score_steps(reward("by_step", per_step=True), None, ["a", "bcd"], ["ef"])
    assert found == [[1.0, 3.0], [2.0]]


def test_s23_step_scores_that_do_not_fit_their_steps_are_named_and_never_a_zero(reward):
    by_step = reward("by_step", per_step=True)
    for answers, reason, words in (
        ([[1.0]], "length", "returned 1 lists of step scores for 2 rollouts"),
        ([[1.0], [1.0]], "steps", "returned 1 step scores for rollout 0, which has 2 steps"),
        ([[1.0] * 2, []], "steps", "returned 0 step scores for rollout 1, which has 1 steps"),
        ([[1.0] * 2, None], "none", "returned None for rollout 1, which has 1 steps"),
        ([[1.0, None], [1.0]], "none", "returned None for step 1 of rollout 0, which has 2 steps"),
        ([1.0, 2.0], "not_a_list", "returned float 1.0 for rollout 0, which has 2 steps"),
        (1.0, "not_a_list", "returned float 1.0, expected 2 lists"),
    ):
        with pytest.raises(RewardFailure, match=words) as failure:
            score_steps(by_step, answers, ["a", "b"], ["c"])
        assert failure.value.reason == reason
    for number in (math.nan, math.inf):
        with pytest.raises(RewardFailure, match="for step 0 of rollout 1, which has 1 steps"):
            check_step_scores([[1.0] * 2, [number]], [2, 1])


def test_a_column_named_steps_is_taken_only_by_a_function_of_steps(reward):
    prompt = make_prompt("?", {"answers": None, "steps": 1})
    rollouts = make_rollouts(prompt, [[5, 1]])
    with pytest.raises(RewardFailure, match="column 'steps'.*function's own"):
        reward("by_step", per_step=True).score_steps(prompt, rollouts, ["a"], [["a"]])
    assert PythonFunctionConfig(function="a:b").own_arguments == ("prompts", "completions")
