"""The first run file: its columns, its text, and that every combination of answers is valid."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path

import pytest

from rlhf_cluster.config import RunConfig
from rlhf_cluster.config.load import load_any
from rlhf_cluster.data.tasks import find_task
from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.planning.new_run_file import (
    MAX_LINES,
    TASKS,
    Answers,
    Columns,
    check_model,
    check_reward,
    choose_columns,
    has_template,
    look_at,
    run_file_text,
    run_name,
)

TURNS = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
WITH_ANSWER = Columns(prompt="question", answer="answer")
DIALOGUES = Columns(prompt="chosen", answer="label", has_turns=True, ends_in_answer=True)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"question": "1 + 1?", "answer": "It is two.\n#### 2"},
            Columns(prompt="question", answer="answer", is_number=True),
        ),
        (
            {"id": "x7", "prompt": "Name a sea", "target": "Baltic"},
            Columns(prompt="prompt", answer="target"),
        ),
        ({"answer": 3, "story": "A fox"}, Columns(prompt="story", answer="answer", is_number=True)),
        ({"id": 7, "messages": TURNS[:1]}, Columns(prompt="messages", has_turns=True)),
        ({"messages": TURNS}, Columns(prompt="messages", has_turns=True, ends_in_answer=True)),
        (
            {
                "chosen": "\n\nHuman: Hi\n\nAssistant: Ho",
                "rejected": "\n\nHuman: Hi\n\nAssistant: No",
            },
            Columns(prompt="chosen", has_turns=True, ends_in_answer=True),
        ),
        ({"prompt": " ", "input": "x", "solution": True}, Columns(prompt="input")),
        (
            {"prompt": "x", "answer": "1,234.5"},
            Columns(prompt="prompt", answer="answer", is_number=True),
        ),
        ({"prompt": "x", "answer": "in 1984"}, Columns(prompt="prompt", answer="answer")),
    ],
)
def test_columns_are_chosen_by_the_first_row(row, expected):
    assert choose_columns(row, "data.jsonl") == expected


def test_what_was_chosen_is_said():
    said = choose_columns({"chosen": "\n\nHuman: Hi\n\nAssistant: Ho", "label": 1}, "").choice
    assert said == (
        "prompt from 'chosen' (a dialogue, whose last answer is left out), right answer from 'label', "
        "a number"
    )
    assert "no column looks like the right answer" in Columns(prompt="prompt").choice


def test_a_row_without_a_prompt_is_refused():
    with pytest.raises(DataError, match=r"d\.jsonl: no column .* found 'answer', 'n'"):
        choose_columns({"answer": "only", "n": 3}, "d.jsonl")


def test_a_missing_file_is_refused_with_the_task_that_needs_none(tmp_path: Path):
    with pytest.raises(DataError, match="no such file") as caught:
        look_at(str(tmp_path / "absent.jsonl"))
    assert "sort_digits" in caught.value.__notes__[0]
    assert look_at("sort_digits") is None


def test_the_built_in_tasks_exist():
    for task in TASKS:
        assert find_task(task)


@pytest.mark.parametrize("reward", ["exact", "maths"])
def test_a_rule_without_an_answer_column_is_refused(reward: str):
    check_reward(reward, WITH_ANSWER)
    check_reward(reward, None)
    with pytest.raises(ConfigError, match="no column of the data looks like the right answer"):
        check_reward(reward, Columns(prompt="prompt"))


def test_other_rewards_are_functions_and_folders(tmp_path: Path):
    check_reward("my_rewards:brevity", Columns(prompt="prompt"))
    check_reward(str(tmp_path), Columns(prompt="prompt"))
    for wrong in ("", "exactly", "my-rewards:f", str(tmp_path / "absent")):
        with pytest.raises(ConfigError, match="none of exact, maths"):
            check_reward(wrong, None)


def test_a_model_is_made_a_folder_or_a_hub_id(tmp_path: Path):
    (tmp_path / "config.json").write_text("{}")
    for right in ("small", "Qwen/Qwen2.5-0.5B-Instruct", str(tmp_path)):
        check_model(right)
    (tmp_path / "empty").mkdir()
    for wrong in ("", "smal", str(tmp_path / "empty"), str(tmp_path / "absent")):
        with pytest.raises(ConfigError, match="no folder with a config"):
            check_model(wrong)


def test_a_chat_template_is_looked_for_in_the_folder(tmp_path: Path):
    assert has_template("Qwen/Qwen2.5-0.5B-Instruct")
    assert not has_template(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": null}')
    assert not has_template(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert has_template(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "name"),
    [("run.toml", "run"), ("a/my run (2).toml", "my-run-2"), ("-.toml", "run"), (".toml", "toml")],
)
def test_the_run_is_named_after_its_file(file: str, name: str):
    assert run_name(Path(file)) == name


DATA = [("sort_digits", None), ("d.jsonl", WITH_ANSWER), ("d.jsonl", DIALOGUES)]
REWARDS = ["exact", "maths", "my_rewards:brevity", "models/reward"]
MODELS = ["small", "models/my-model", "Qwen/Qwen2.5-0.5B-Instruct"]
COMBINATIONS = list(itertools.product(DATA, REWARDS, MODELS, (True, False), (True, False)))


def read(answers: Answers, folder: Path) -> RunConfig:
    (folder / "run.toml").write_text(run_file_text(answers))
    config = load_any(folder / "run.toml")
    assert isinstance(config, RunConfig)
    return config


@pytest.mark.parametrize(("data", "reward", "model", "template", "few"), COMBINATIONS)
def test_every_combination_is_a_short_valid_file_with_comments(
    data, reward: str, model: str, template: bool, few: bool, tmp_path: Path
):
    path, columns = data
    answers = Answers(
        name="mine",
        data=path,
        columns=columns,
        reward=reward,
        model=model,
        steps=7,
        has_template=template,
        few_cores=few,
    )
    text = run_file_text(answers)
    assert len(text.splitlines()) <= MAX_LINES
    assert [line for line in text.splitlines() if "  # " not in line] == []
    config = read(answers, tmp_path)
    assert (config.run.name, config.run.steps) == ("mine", 7)
    assert (config.data.task or config.data.path) == path
    assert config.model.path == (None if model == "small" else model)
    (only,) = config.scoring.rewards
    assert (
        only.type
        == {
            "exact": "exact_match",
            "maths": "maths",
            "my_rewards:brevity": "python",
            "models/reward": "reward_model",
        }[reward]
    )
    if columns is not None:
        assert config.data.prompt_column == columns.prompt
        assert config.data.drop_answer == columns.ends_in_answer
        assert config.data.template == ("chat" if template or columns.has_turns else "none")
    if columns is not None and reward in ("exact", "maths"):
        assert getattr(only, "target_column", None) == columns.answer


def test_an_exact_number_is_compared_as_a_number(tmp_path: Path):
    columns = Columns(prompt="question", answer="answer", is_number=True)
    answers = Answers(name="n", data="d.jsonl", columns=columns, reward="exact", model="o/m")
    assert read(answers, tmp_path).scoring.rewards[0].type == "numeric"


def test_names_with_quotes_and_other_characters_survive(tmp_path: Path):
    odd = 'a "b" \\ # \x7f é 🦊'
    answers = Answers(
        name="n", data=odd, columns=Columns(prompt=odd, answer=odd), reward="maths", model="o/m"
    )
    tree = tomllib.loads(run_file_text(answers))
    assert tree["data"]["path"] == tree["data"]["prompt_column"] == odd
    assert tree["scoring"]["rewards"][0]["target_column"] == odd


def test_answers_that_make_no_valid_file_are_refused():
    with pytest.raises(ConfigError, match=r"run\.steps"):
        run_file_text(Answers(name="n", data="sort_digits", reward="exact", model="small", steps=0))


def test_only_the_first_row_is_read(tmp_path: Path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "x", "answer": 1}) + "\nnot json\n")
    assert look_at(str(path)) == Columns(prompt="prompt", answer="answer", is_number=True)
