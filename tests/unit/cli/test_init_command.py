"""`init`: questions and flags, the file it writes, and that `validate` accepts it."""

from __future__ import annotations

import itertools
import json
import tomllib
from pathlib import Path

import pytest

from rlhf_cluster.cli.commands import main
from rlhf_cluster.cli.init_command import write_run_file
from rlhf_cluster.errors import ConfigError, RunError
from rlhf_cluster.models.make_model import make_model
from rlhf_cluster.sections.every_run import BpeTokenizer, ModelInit

NOTHING = {"data": None, "reward": None, "model": None}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with data files, a reward function and a folder of a reward model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    rows = [{"question": f"What is {a} + {a}?", "answer": str(2 * a)} for a in range(40)]
    Path("text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
            ],
            "target": row["answer"],
        }
        for row in rows
    ]
    Path("turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    Path("my_rewards.py").write_text(
        "def brevity(prompts, completions, **columns):\n    return [-len(c) for c in completions]\n"
    )
    Path("reward").mkdir()
    return tmp_path


class Answering:
    """Answers the questions in turn, and keeps them."""

    def __init__(self, *answers: str) -> None:
        self._answers = list(answers)
        self.questions: list[str] = []

    def __call__(self, question: str, default: str) -> str:
        self.questions.append(question.partition(":")[0])
        return self._answers.pop(0) or default


def test_three_answers_write_the_file(here: Path, capsys):
    ask = Answering("text.jsonl", "", "small")
    write_run_file(Path("mine.toml"), NOTHING, 5, False, ask, True, 8)
    assert ask.questions == ["Data", "Reward", "Model"]
    tree = tomllib.loads(Path("mine.toml").read_text())
    assert tree["run"] == {"name": "mine", "steps": 5, "groups_per_step": 8}
    assert tree["scoring"]["rewards"] == [{"type": "numeric", "target_column": "answer"}]
    assert "cluster" not in tree
    assert "prompt from 'question' (text), right answer from 'answer'" in capsys.readouterr().out


def test_only_what_no_flag_gives_is_asked(here: Path):
    ask = Answering("maths")
    given = {"data": "text.jsonl", "reward": None, "model": "small"}
    write_run_file(Path("run.toml"), given, 5, False, ask, True, 8)
    assert ask.questions == ["Reward"]


def test_an_answer_that_cannot_be_used_is_asked_for_again(here: Path, capsys):
    ask = Answering("absent.jsonl", "sort_digits", "exactly", "exact", "small")
    write_run_file(Path("run.toml"), NOTHING, 5, False, ask, True, 2)
    assert ask.questions == ["Data", "Data", "Reward", "Reward", "Model"]
    errors = capsys.readouterr().err
    assert "absent.jsonl: no such file" in errors
    assert "reward 'exactly'" in errors
    assert tomllib.loads(Path("run.toml").read_text())["cluster"] == {"num_cpus": 4}


def test_a_flag_that_cannot_be_used_is_an_error(here: Path):
    given = {"data": "sort_digits", "reward": "exactly", "model": "small"}
    with pytest.raises(ConfigError, match="'exactly': none of exact"):
        write_run_file(Path("run.toml"), given, 5, False, Answering(), True, 8)
    assert not Path("run.toml").exists()


def test_off_a_terminal_missing_flags_are_named(here: Path, capsys):
    with pytest.raises(RunError, match=r"and --reward, --model not given\. Give them, or --yes"):
        write_run_file(
            Path("run.toml"), {**NOTHING, "data": "sort_digits"}, 5, False, None, False, 8
        )
    assert main(["init", "--data", "sort_digits", "--reward", "exact"]) == 1
    assert "--model not given. Give it, or --yes" in capsys.readouterr().err
    assert not Path("run.toml").exists()


def test_a_file_is_overwritten_only_by_force(here: Path, capsys):
    Path("run.toml").write_text("mine")
    assert main(["init", "--yes"]) == 1
    assert "run.toml exists already" in capsys.readouterr().err
    assert Path("run.toml").read_text() == "mine"
    assert main(["init", "--yes", "--force", "--steps", "3"]) == 0
    assert tomllib.loads(Path("run.toml").read_text())["run"]["steps"] == 3


def test_a_place_that_cannot_be_written_is_one_message(here: Path, capsys):
    assert main(["init", "absent/run.toml", "--yes"]) == 1
    assert "error: absent/run.toml: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "reward", "model"),
    list(
        itertools.product(
            ("sort_digits", "text.jsonl", "turns.jsonl"),
            ("exact", "maths", "my_rewards:brevity", "reward"),
            ("small", "model"),
        )
    ),
)
def test_validate_accepts_every_combination(here: Path, data, reward, model, capsys):
    if model == "model":
        tokenizer = BpeTokenizer(path="text.jsonl", vocab_size=512)
        make_model(ModelInit(max_position=1024, num_layers=1, tokenizer=tokenizer), "model", 0)
    flags = ["--data", data, "--reward", reward, "--model", model]
    assert main(["init", *flags]) == 0, capsys.readouterr().err
    assert main(["validate", "run.toml"]) == 0, capsys.readouterr().err
    assert "run.toml: valid" in capsys.readouterr().out
