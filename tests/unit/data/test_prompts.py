"""The stream of prompts: epochs, resume, lengths, columns, chat, held-out prompts."""

import json
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_cluster.config import RunConfig, validate
from rlhf_cluster.data.prompts import (
    PromptSource,
    check_overlap,
    evaluation_prompts,
    set_prompts,
    sft_examples,
)
from rlhf_cluster.data.tasks import is_held_out
from rlhf_cluster.errors import DataError
from rlhf_cluster.models.make_model import make_tokenizer
from rlhf_cluster.records import Prompt
from rlhf_cluster.sections.rl_run import Data

TOKENIZER = make_tokenizer()
CHAT = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def chat_tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def jsonl(folder: Path, rows: list, name: str = "data.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def numbered(folder: Path, num: int) -> str:
    return jsonl(folder, [{"prompt": f"p{n}", "answer": f"a{n}", "n": n} for n in range(num)])


def draw(source: PromptSource, num: int) -> list[str]:
    return [source.next().prompt_id for _ in range(num)]


# The stream


def test_every_row_comes_once_an_epoch_in_another_order(tmp_path: Path) -> None:
    source = PromptSource(Data(path=numbered(tmp_path, 7)), TOKENIZER, seed=3)
    ids = draw(source, 21)
    epochs = [ids[k : k + 7] for k in (0, 7, 14)]
    for number, epoch in enumerate(epochs):
        assert sorted(epoch) == [f"{row}-e{number}" for row in range(7)]
    assert len({tuple(i.split("-")[0] for i in epoch) for epoch in epochs}) == 3


def test_without_shuffle_rows_come_in_file_order(tmp_path: Path) -> None:
    source = PromptSource(Data(path=numbered(tmp_path, 3), shuffle=False), TOKENIZER, seed=3)
    assert draw(source, 4) == ["0-e0", "1-e0", "2-e0", "0-e1"]


def test_the_order_depends_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    data = Data(path=numbered(tmp_path, 50))
    same = [draw(PromptSource(data, TOKENIZER, seed=1), 120) for _ in range(2)]
    assert same[0] == same[1]
    assert draw(PromptSource(data, TOKENIZER, seed=2), 120) != same[0]


@pytest.mark.parametrize("kind", ["file", "task", "limited task"])
def test_s30_seek_continues_exactly_wherever_the_run_was_killed(tmp_path: Path, kind: str) -> None:
    data = {
        "file": Data(path=numbered(tmp_path, 5)),
        "task": Data(task="sort_digits"),
        "limited task": Data(task="sort_digits", limit=5),
    }[kind]
    whole = PromptSource(data, TOKENIZER, seed=0)
    prompts = [whole.next() for _ in range(17)]
    assert whole.cursor == 17
    for killed_at in range(17):
        first = PromptSource(data, TOKENIZER, seed=0)
        trained = draw(first, killed_at)
        resumed = PromptSource(data, TOKENIZER, seed=0)
        resumed.seek(first.cursor)
        assert trained + draw(resumed, 17 - killed_at) == [p.prompt_id for p in prompts]
    if kind != "task":
        counts = Counter(p.prompt_id.split("-")[0] for p in prompts)
        assert sorted(counts.values()) == [3, 3, 3, 4, 4]


def test_seek_is_immediate_however_far(tmp_path: Path) -> None:
    for data in (Data(task="sort_digits"), Data(path=numbered(tmp_path, 5))):
        source = PromptSource(data, TOKENIZER, seed=0)
        source.seek(10**12)
        assert source.next().prompt_id.split("-e")[0].isdigit()
        assert source.cursor == 10**12 + 1
    with pytest.raises(DataError, match="cursor = -1"):
        source.seek(-1)


def test_a_prompt_carries_ids_source_and_the_other_columns_with_their_types(tmp_path: Path) -> None:
    row = {"prompt": "1+1=", "answer": 2, "tags": ["a", None], "meta": {"x": 1.5}}
    source = PromptSource(Data(path=jsonl(tmp_path, [row])), TOKENIZER, seed=0)
    prompt = source.next()
    assert prompt.token_ids.dtype == np.int32
    assert prompt.token_ids.tolist() == TOKENIZER("1+1=")["input_ids"]
    assert prompt.source == "1+1="
    assert prompt.columns == {"answer": 2, "tags": ["a", None], "meta": {"x": 1.5}}


def test_parquet_rows_equal_jsonl_rows(tmp_path: Path) -> None:
    rows = [{"q": f"{n}+{n}=", "answer": 2 * n, "parts": [n, n]} for n in range(5)]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    paths = [str(tmp_path / "data.parquet"), jsonl(tmp_path, rows)]
    streams = []
    for path in paths:
        source = PromptSource(Data(path=path, prompt_column="q"), TOKENIZER, seed=0)
        prompts = [source.next() for _ in range(5)]
        streams.append([(p.prompt_id, p.source, p.columns, p.token_ids.tolist()) for p in prompts])
    assert streams[0] == streams[1]


def test_limit_uses_the_first_rows_only(tmp_path: Path) -> None:
    source = PromptSource(Data(path=numbered(tmp_path, 9), limit=2), TOKENIZER, seed=0)
    assert {i.split("-")[0] for i in draw(source, 10)} == {"0", "1"}


def test_a_task_never_repeats_a_row_number() -> None:
    source = PromptSource(Data(task="sort_digits"), TOKENIZER, seed=0)
    prompts = [source.next() for _ in range(600)]
    assert [p.prompt_id for p in prompts] == [f"{n}-e0" for n in range(600)]
    assert len({p.source for p in prompts}) > 550


# Lengths


def lengths(folder: Path) -> str:
    return jsonl(folder, [{"prompt": "x" * n} for n in (1, 9, 2, 10, 3, 30)])


def test_long_prompts_are_refused_with_their_lines(tmp_path: Path) -> None:
    path = lengths(tmp_path)
    with pytest.raises(DataError) as caught:
        PromptSource(Data(path=path, max_prompt_tokens=9), TOKENIZER, seed=0)
    message = str(caught.value)
    assert f"{path}: 3 of 6 prompts are longer than data.max_prompt_tokens = 9" in message
    assert "(line 2, line 4, line 6; the longest has 31 tokens)" in message
    assert "on_long_prompt = 'skip'" in message


def test_long_prompts_are_left_out_and_counted_when_asked_and_nothing_is_cut(
    tmp_path: Path,
) -> None:
    data = Data(path=lengths(tmp_path), max_prompt_tokens=10, on_long_prompt="skip")
    source = PromptSource(data, TOKENIZER, seed=0)
    assert source.num_skipped == 2
    prompts = [source.next() for _ in range(4)]
    assert sorted(len(p.token_ids) for p in prompts) == [2, 3, 4, 10]
    assert sorted(p.prompt_id for p in prompts) == ["0-e0", "1-e0", "2-e0", "4-e0"]


def test_a_data_set_of_long_prompts_only_is_refused_even_with_skip(tmp_path: Path) -> None:
    data = Data(path=lengths(tmp_path), max_prompt_tokens=1, on_long_prompt="skip")
    with pytest.raises(
        DataError, match=r"6 of 6 prompts are longer.*Raise data.max_prompt_tokens$"
    ):
        PromptSource(data, TOKENIZER, seed=0)


def test_a_task_whose_prompts_are_too_long_is_refused() -> None:
    with pytest.raises(
        DataError, match=r"task sort_digits: 256 of 256 prompts are longer than.*= 7"
    ):
        PromptSource(Data(task="sort_digits", max_prompt_tokens=7), TOKENIZER, seed=0)


# Chat and the first token


def chat_prompt(folder: Path, value, **settings) -> str:
    data = Data(path=jsonl(folder, [{"prompt": value}]), template="chat", **settings)
    return TOKENIZER.decode(PromptSource(data, chat_tokenizer(), seed=0).next().token_ids)


def test_text_becomes_a_user_turn_of_the_chat_template(tmp_path: Path) -> None:
    assert chat_prompt(tmp_path, "hi") == "<bos>[user]hi<eos>[assistant]"
    assert (
        chat_prompt(tmp_path, "hi", system_prompt="be kind")
        == "<bos>[system]be kind<eos>[user]hi<eos>[assistant]"
    )


def test_messages_are_rendered_and_kept_as_source(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    assert chat_prompt(tmp_path, messages) == (
        "<bos>[user]a<eos>[assistant]b<eos>[user]c<eos>[assistant]"
    )
    data = Data(path=str(tmp_path / "data.jsonl"), template="chat")
    assert PromptSource(data, chat_tokenizer(), seed=0).next().source == messages


def test_of_a_dialogue_the_turns_before_the_last_answer_are_the_prompt(tmp_path: Path) -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d"
    turns = [
        {"role": r, "content": t} for r, t in zip(["user", "assistant"] * 2, "abcd", strict=True)
    ]
    for value in (text, turns):
        path = jsonl(tmp_path, [{"chosen": value}])
        data = Data(path=path, prompt_column="chosen", template="chat", drop_answer=True)
        prompt = PromptSource(data, chat_tokenizer(), seed=0).next()
        assert prompt.source == turns[:3]
        shown = TOKENIZER.decode(prompt.token_ids.tolist(), skip_special_tokens=True)
        assert shown == "[user]a[assistant]b[user]c[assistant]"


@pytest.mark.parametrize("value", ["no dialogue", "\n\nHuman: a", "\n\nAssistant: b", [], 3])
def test_what_is_no_dialogue_with_an_answer_is_refused(tmp_path: Path, value: object) -> None:
    data = Data(path=jsonl(tmp_path, [{"prompt": value}]), template="chat", drop_answer=True)
    with pytest.raises(DataError, match=r"line 1, column 'prompt': .*Correct the row"):
        PromptSource(data, chat_tokenizer(), seed=0)


def test_s16_a_prompt_starts_with_exactly_one_bos(tmp_path: Path) -> None:
    bos = TOKENIZER.bos_token_id
    path = jsonl(tmp_path, [{"prompt": "<bos>12="}, {"prompt": "12="}])
    source = PromptSource(Data(path=path), TOKENIZER, seed=0)
    for _ in range(2):
        assert source.next().token_ids.tolist() == TOKENIZER("12=")["input_ids"]
    chat = Data(path=jsonl(tmp_path, [{"prompt": "<bos>12="}]), template="chat")
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    assert PromptSource(chat, tokenizer, seed=0).next().token_ids.tolist().count(bos) == 1


def test_the_chat_template_is_required_when_asked_for(tmp_path: Path) -> None:
    data = Data(path=numbered(tmp_path, 1), template="chat")
    tokenizer = make_tokenizer()
    tokenizer.name_or_path = "models/base"
    with pytest.raises(DataError, match=r"tokenizer models/base has no chat template.*'none'"):
        PromptSource(data, tokenizer, seed=0)


def test_a_chat_template_that_fails_names_the_row(tmp_path: Path) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    data = Data(path=numbered(tmp_path, 1), template="chat")
    with pytest.raises(
        DataError, match=r"data.jsonl, line 1, column 'prompt'.*roles must alternate"
    ):
        PromptSource(data, tokenizer, seed=0)


def test_two_system_messages_are_refused(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    with pytest.raises(DataError, match=r"line 1.*own system message.*Remove one"):
        chat_prompt(tmp_path, messages, system_prompt="c")


# Supervised examples


def test_examples_pair_prompts_with_targets_that_end(tmp_path: Path) -> None:
    data = Data(path=numbered(tmp_path, 5))
    source = PromptSource(data, TOKENIZER, seed=0)
    examples = list(source.sft_examples(10, "answer"))
    assert source.cursor == 0
    texts = Counter(TOKENIZER.decode([*e.prompt_ids, *e.target_ids]) for e in examples)
    assert texts == {f"<bos>p{n}a{n}<eos>": 2 for n in range(5)}
    again = sft_examples(data, TOKENIZER, 0, 10, "answer")
    assert [e.prompt_ids.tolist() for e in again] == [e.prompt_ids.tolist() for e in examples]


def test_the_warm_up_on_a_task_sees_other_rows_than_the_run() -> None:
    source = PromptSource(Data(task="sort_digits"), TOKENIZER, seed=0)
    warm_up = {tuple(e.prompt_ids.tolist()) for e in source.sft_examples(500, "answer")}
    run = {tuple(source.next().token_ids.tolist()) for _ in range(500)}
    assert len(warm_up & run) < 5


def test_s15_the_end_token_is_in_the_target_also_when_it_is_the_padding_token(
    tmp_path: Path,
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    source = PromptSource(Data(path=numbered(tmp_path, 1)), tokenizer, seed=0)
    (example,) = source.sft_examples(1, "answer")
    assert example.target_ids.tolist()[-1] == tokenizer.eos_token_id
    assert len(example.target_ids) == len("a0") + 1


def test_s16_prompt_and_target_are_never_merged_into_one_token(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: n for n, token in enumerate(["<eos>", "a", "b", "c", "bc"])}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("b", "c")]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merging, eos_token="<eos>")
    assert tokenizer("abc")["input_ids"] == [1, 4]
    data = Data(path=jsonl(tmp_path, [{"prompt": "ab", "answer": "c"}]))
    (example,) = PromptSource(data, tokenizer, seed=0).sft_examples(1, "answer")
    assert example.prompt_ids.tolist() == [1, 2]
    assert example.target_ids.tolist() == [3, 0]


def test_targets_that_cannot_be_learned_are_refused(tmp_path: Path) -> None:
    source = PromptSource(Data(path=numbered(tmp_path, 1)), TOKENIZER, seed=0)
    with pytest.raises(DataError, match=r"line 1: no column 'gold'.*'answer', 'n'.*target_column"):
        next(source.sft_examples(1, "gold"))
    with pytest.raises(DataError, match=r"line 1, column 'n': found int 0, expected the text"):
        next(source.sft_examples(1, "n"))
    with pytest.raises(DataError, match="3 tokens with the end token, 2 fit"):
        next(source.sft_examples(1, "answer", max_target_tokens=2))


# Held-out prompts


def config(**sections) -> RunConfig:
    tree = {
        "run": {"name": "t", "steps": 1, "groups_per_step": 4},
        "model": {"init": {}},
        "generation": {"max_response_tokens": 8},
        "learner": {"learning_rate": 1e-3},
        "scoring": {"rewards": [{"type": "exact_match"}]},
        "data": {"max_prompt_tokens": 40, **sections.pop("data")},
        **sections,
    }
    return validate(RunConfig, tree, source="test")


def first_held_out(c: RunConfig, num: int) -> list[Prompt]:
    return evaluation_prompts(c.data, c.evaluation, c.run.seed, TOKENIZER, num)


def test_held_out_prompts_of_a_task_are_never_trained_on() -> None:
    held_out = first_held_out(config(data={"task": "sort_digits"}), 300)
    sources = {p.source for p in held_out}
    assert len(sources) == 300
    for seed in (0, 1):
        stream = PromptSource(Data(task="sort_digits"), TOKENIZER, seed=seed)
        trained = {stream.next().source for _ in range(5000)}
        assert not trained & sources
        assert not any(is_held_out(text) for text in trained)
    again = first_held_out(config(data={"task": "sort_digits"}), 300)
    assert [p.prompt_id for p in again] == [p.prompt_id for p in held_out]


def test_held_out_prompts_of_a_file_are_its_first_in_order(tmp_path: Path) -> None:
    path = numbered(tmp_path, 5)
    made = config(data={"path": path}, evaluation={"path": path})
    prompts = first_held_out(made, 3)
    assert [(p.prompt_id, p.source) for p in prompts] == [
        ("eval-0", "p0"),
        ("eval-1", "p1"),
        ("eval-2", "p2"),
    ]
    assert first_held_out(made, 0) == []
    with pytest.raises(DataError, match=r"5 usable prompts, evaluation.num_prompts = 6"):
        first_held_out(made, 6)


def held_out_set(c: RunConfig, check: bool = True) -> list[Prompt]:
    """The prompts of the only evaluation set, checked against what the run trains on."""
    [of] = c.evaluation.all_sets
    prompts = set_prompts(c.data, c.evaluation, of, c.run.seed, TOKENIZER)
    source = PromptSource(c.data, TOKENIZER, c.run.seed)
    check_overlap(c.data, source, c.evaluation, of, prompts)
    return prompts


def test_rows_of_one_file_are_either_trained_on_or_held_out(tmp_path: Path) -> None:
    path = numbered(tmp_path, 10)
    other = shutil.copy(path, tmp_path / "other.jsonl")

    def made(limit: int | None, skip_rows: int, file: str = path, **rest: Any) -> RunConfig:
        held_out = {"name": "own", "data": {"path": file, "skip_rows": skip_rows}, "num_prompts": 5}
        return config(data={"path": path, "limit": limit}, evaluation={"sets": [held_out], **rest})

    assert [p.prompt_id for p in held_out_set(made(7, 7))] == ["eval-7", "eval-8", "eval-9"]
    overlap = (
        r"the evaluation set 'own' both read .*, and 2 of the set's 5 prompts .* row 5, from 0"
    )
    with pytest.raises(DataError, match=overlap):
        held_out_set(made(7, 5))
    with pytest.raises(DataError, match="5 of the set's 5 prompts"):
        held_out_set(made(None, 0, f"{tmp_path}/./{Path(path).name}"))
    assert len(held_out_set(made(7, 5, allow_overlap=True))) == 5
    assert len(held_out_set(made(None, 0, str(other)))) == 5
    with pytest.raises(
        DataError, match=r"'own' has no prompts: .* 10 rows, and data.skip_rows = 10"
    ):
        held_out_set(made(7, 10))


def test_a_set_has_the_held_out_split_of_the_run_or_data_of_its_own(tmp_path: Path) -> None:
    path = numbered(tmp_path, 3)
    task = {"task": "sort_digits"}
    split = config(data=task, evaluation={"sets": [{"name": "a", "num_prompts": 4}]})
    assert [p.source for p in held_out_set(split)] == [
        p.source for p in first_held_out(config(data=task), 4)
    ]
    own = config(data=task, evaluation={"sets": [{"name": "a", "data": {"path": path}}]})
    assert [p.source for p in held_out_set(own)] == ["p0", "p1", "p2"]


def test_a_real_data_set_is_read_whole() -> None:
    folder = os.environ.get("RLHF_REAL_DATA")
    if not folder:
        pytest.skip("RLHF_REAL_DATA names no folder with gsm8k/test.jsonl")
    data = Data(
        path="${RLHF_REAL_DATA}/gsm8k/test.jsonl",
        prompt_column="question",
        max_prompt_tokens=600,
        on_long_prompt="skip",
    )
    source = PromptSource(data, TOKENIZER, seed=0)
    prompts = [source.next() for _ in range(1319 - source.num_skipped)]
    assert len({p.prompt_id for p in prompts}) == 1319 - source.num_skipped
    assert all("####" in p.columns["answer"] for p in prompts)
    assert source.next().prompt_id.endswith("-e1")
