"""The first run file of a user, for `rlhf-cluster init`: made from three answers.

    data    a built-in task, or a data file: `look_at` chooses its columns by the first row
    reward  "exact", "maths", "module:function", or the folder of a reward model
    model   a folder, a Hub id, or "small": made from random weights

Promises: the file has at most 20 lines with a comment each; its settings are valid, or
`run_file_text` raises before anything is written.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_cluster.config.load import of_tree
from rlhf_cluster.data.dialogues import is_dialogue, parse_dialogue
from rlhf_cluster.data.rows import expand, read_rows
from rlhf_cluster.errors import ConfigError, DataError
from rlhf_cluster.models.hub import is_hub_id

TASKS = ("sort_digits",)
SMALL = "small"
RULES = ("exact", "maths")
MAX_LINES = 20
LOGICAL_CPUS = 4
"""Cores that generation, scoring and learner reserve by default, and one to spare."""

_PROMPTS = ("prompt", "question", "problem", "query", "instruction", "input", "messages")
_DIALOGUES = ("conversation", "conversations", "dialogue", "text", "chosen")
_ANSWERS = (
    *("answer", "final_answer", "expected_answer", "ground_truth", "target", "label"),
    *("solution", "output", "response", "completion"),
)
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
_NOT_IN_NAME = re.compile(r"[^A-Za-z0-9._-]+")
_NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Columns of a data file. `answer` is None where none looks like one.

    `has_turns`: prompts are dialogues. `ends_in_answer`: the last turn is the assistant's.
    `is_number`: the answer is a number, or has one marked as GSM8K does.
    """

    prompt: str
    answer: str | None = None
    has_turns: bool = False
    ends_in_answer: bool = False
    is_number: bool = False

    @property
    def choice(self) -> str:
        """The columns in words, for the user."""
        kind = "a dialogue" if self.has_turns else "text"
        kind += ", whose last answer is left out" if self.ends_in_answer else ""
        right = "no column looks like the right answer"
        if self.answer is not None:
            right = f"right answer from {self.answer!r}" + (", a number" * self.is_number)
        return f"prompt from {self.prompt!r} ({kind}), {right}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Answers of the user. `columns` is None for a task; `few_cores`: fewer than the run reserves."""

    name: str
    data: str
    reward: str
    model: str
    columns: Columns | None = None
    steps: int = 100
    has_template: bool = True
    few_cores: bool = False


def look_at(data: str) -> Columns | None:
    """Return the columns of a data file by its first row, or None for a task. Raises `DataError`."""
    if data in TASKS:
        return None
    try:
        return choose_columns(read_rows(expand(data), 1)[0].columns, data)
    except DataError as error:
        error.add_note(f"Without a file, the built-in task: {', '.join(TASKS)}")
        raise


def choose_columns(row: Mapping[str, Any], data: str) -> Columns:
    """Return the columns that look like prompt and right answer. Raises `DataError`."""
    prompts = [name for name, value in row.items() if _is_prompt(value)]
    prompt = next((name for name in (*_PROMPTS, *_DIALOGUES) if name in prompts), None)
    if prompt is None:
        others = [name for name in prompts if name not in _ANSWERS]
        if not others:
            raise DataError(
                f"{data}: no column of the first row is text or a list of {{role, content}} messages; "
                f"found {', '.join(map(repr, row))}. Give a file with a column of prompts"
            )
        prompt = others[0]
    answers = {n for n, v in row.items() if n != prompt and _is_answer(v)}
    answer = next((name for name in _ANSWERS if name in answers), None)
    roles = _roles(row[prompt])
    return Columns(
        prompt=prompt,
        answer=answer,
        has_turns=bool(roles),
        ends_in_answer=len(roles) > 1 and roles[-1] == "assistant",
        is_number=answer is not None and _has_number(row[answer]),
    )


def check_reward(reward: str, columns: Columns | None) -> None:
    """Raise `ConfigError` for a reward that is none of the known, or that lacks its column."""
    if reward in RULES:
        if columns is not None and columns.answer is None:
            raise ConfigError(
                f"reward {reward!r}: no column of the data looks like the right answer. Name one "
                f"{_ANSWERS[0]!r}, or give a function of your own (MODULE:FUNCTION)"
            )
    elif not reward or not (_FUNCTION.fullmatch(reward) or Path(reward).is_dir()):
        raise ConfigError(
            f"reward {reward!r}: none of {', '.join(RULES)}, no MODULE:FUNCTION, and no folder of a "
            "reward model. Give one of these"
        )


def check_model(model: str) -> None:
    """Raise `ConfigError` unless `model` is "small", a model folder, or may be a Hub id."""
    if model == SMALL or is_hub_id(model) or (model and (Path(model) / "config.json").is_file()):
        return
    raise ConfigError(
        f"model {model!r}: no folder with a config.json, and no Hub id (OWNER/NAME). Give one of "
        f"these, or {SMALL!r}"
    )


def has_template(model: str) -> bool:
    """Return whether the model has a chat template. One that is not here is taken to have it."""
    folder = Path(model)
    if model == SMALL or not folder.is_dir() or (folder / "chat_template.jinja").exists():
        return True
    try:
        return bool(
            json.loads((folder / "tokenizer_config.json").read_bytes()).get("chat_template")
        )
    except (OSError, ValueError, AttributeError):
        return False


def run_name(file: Path) -> str:
    """Return the name of the run of a file: the file's own, with what a name may not have replaced."""
    return _NOT_IN_NAME.sub("-", file.stem).strip("-._")[:64] or "run"


def run_file_text(answers: Answers) -> str:
    """Return the run file. Raises `ConfigError` for answers that make no valid one."""
    rows = list(_rows(answers))
    width = max(len(code) for code, _ in rows if len(code) <= 40)
    text = "".join(f"{code:<{width}}  # {comment}\n" for code, comment in rows)
    of_tree(tomllib.loads(text), "the new run file")
    return text


def _rows(answers: Answers) -> Iterator[tuple[str, str]]:
    """Yield each line as code and comment."""
    from_task = answers.columns is None
    small = answers.model == SMALL
    yield "[run]", "`rlhf-cluster config KEY` explains a key, such as run.steps"
    yield f"name = {_text(answers.name)}", "the results are in runs/NAME"
    yield f"steps = {answers.steps}", "updates of the model"
    yield "groups_per_step = 8", "prompts of a step, each answered algorithm.group_size times"
    if answers.few_cores:
        yield "[cluster]", "this machine"
        yield f"num_cpus = {LOGICAL_CPUS}", "more than it has cores, so its processes take turns"
    yield "[model]", "the model to train"
    yield from _model_rows(answers)
    yield "[data]", "the prompts"
    yield from _data_rows(answers)
    if from_task and small:
        yield "[sft]", "a short supervised warm-up: random weights earn no reward to learn from"
        yield "steps = 40", "0 for a model that can do the task already"
    yield "[generation]", "num_gpus = 1 gives each worker a GPU; so in [scoring] and [learner]"
    yield f"max_response_tokens = {8 if from_task else 256}", "a longer answer is cut there"
    yield "[scoring]", "what a good answer is; several rewards are added up"
    yield f"rewards = [{_reward(answers)}]", "docs/rewards.md has all kinds"
    yield "[learner]", "the training"
    rate = "1e-6" if not small else "3e-4" if from_task else "1e-4"
    yield f"learning_rate = {rate}", "raise it if the reward stays flat, lower it if it collapses"
    if from_task:
        yield "[evaluation]", "prompts that are not trained on"
        yield "num_prompts = 64", "answered before and after training"


def _model_rows(answers: Answers) -> Iterator[tuple[str, str]]:
    if answers.model != SMALL:
        yield f"path = {_text(answers.model)}", "a folder, or OWNER/NAME on the Hugging Face Hub"
    elif answers.columns is None:
        yield "init = { max_position = 1024 }", "made here, of random weights and characters"
    else:
        tokenizer = f'{{ type = "bpe", path = {_text(answers.data)}, vocab_size = 1024 }}'
        made = f"init = {{ max_position = 1024, tokenizer = {tokenizer} }}"
        yield made, "made here, of random weights: shows that all works, learns little"


def _data_rows(answers: Answers) -> Iterator[tuple[str, str]]:
    columns = answers.columns
    if columns is None:
        yield f"task = {_text(answers.data)}", "built in: six digits, to be sorted"
        return
    yield f"path = {_text(answers.data)}", "one prompt per row"
    yield f"prompt_column = {_text(columns.prompt)}", "the other columns go to the rewards"
    if columns.has_turns or answers.has_template:
        yield 'template = "chat"', 'the chat template; "none": the model continues the text'
    else:
        yield 'template = "none"', 'the model continues the text; "chat" needs a chat template'
    if columns.ends_in_answer:
        yield "drop_answer = true", "the last answer of each dialogue is left out of the prompt"
    yield (
        'on_long_prompt = "skip"',
        "skip prompts over data.max_prompt_tokens (512), and count them",
    )


def _reward(answers: Answers) -> str:
    """Return the table of the reward, on one line."""
    reward, columns = answers.reward, answers.columns
    target = ""
    if columns is not None and columns.answer is not None:
        target = f", target_column = {_text(columns.answer)}"
    if reward == "exact":
        kind = "numeric" if columns is not None and columns.is_number else "exact_match"
        return f'{{ type = "{kind}"{target} }}'
    if reward == "maths":
        return f'{{ type = "maths"{target} }}'
    if _FUNCTION.fullmatch(reward):
        return f'{{ type = "python", function = "{reward}" }}'
    return f'{{ type = "reward_model", path = {_text(reward)}, tokenizer = "own" }}'


def _text(value: str) -> str:
    """Return `value` as a TOML string."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _roles(value: Any) -> Sequence[str]:
    """Return the roles of a dialogue in order, empty for what is none."""
    if isinstance(value, str) and is_dialogue(value):
        return [turn["role"] for turn in parse_dialogue(value, "the first row")]
    if isinstance(value, list) and value and all(_is_turn(turn) for turn in value):
        return [turn["role"] for turn in value]
    return ()


def _is_turn(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(value.get(key), str) for key in ("role", "content")
    )


def _is_prompt(value: Any) -> bool:
    return bool(isinstance(value, str) and value.strip()) or bool(_roles(value))


def _is_answer(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _has_number(value: Any) -> bool:
    if not isinstance(value, str):
        return True
    return _NUMBER.fullmatch(value.rpartition("####")[2].strip()) is not None
