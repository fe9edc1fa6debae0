"""A user's Python function as a reward: the arguments it gets, and what becomes of its answer."""

import datetime
from pathlib import Path

import pytest

from rlhf_cluster.config import validate
from rlhf_cluster.errors import ConfigError
from rlhf_cluster.rewards.base import RewardContext
from rlhf_cluster.rewards.failure import RewardFailure
from rlhf_cluster.rewards.python_function import PythonFunction, PythonFunctionConfig
from tests.rewarding import make_prompt, make_rollouts

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
