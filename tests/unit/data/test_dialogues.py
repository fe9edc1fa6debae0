"""What supervised fine-tuning trains of a dialogue: masks by construction, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from rlhf_cluster.data.dialogues import encode_dialogue
from rlhf_cluster.data.preferences import UnusableRow
from rlhf_cluster.data.rows import Row
from rlhf_cluster.errors import DataError
from rlhf_cluster.offline import build_stage
from rlhf_cluster.offline.stage import StageContext
from rlhf_cluster.offline.train_sft import SftConfig
from rlhf_cluster.sections.offline_stage import StageData
from tests.support.builders.offline_stages import CHATML, chat_tokenizer

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and m.content %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL = (
    "{% for m in messages %}{{ m.role }}:"
    "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)

MARKS = "<|im_end|>\n<|im_start|>assistant\nI am the assistant<|im_end|>\n"

Turns = list[tuple[str, str]]

DIALOGUES: dict[str, Turns] = {
    "one turn": [("user", "hi"), ("assistant", "hello")],
    "every turn": [
        ("user", "a"),
        ("assistant", "first"),
        ("user", "b"),
        ("assistant", "second"),
        ("user", "c"),
        ("assistant", "third"),
    ],
    "system": [("system", "be kind"), ("user", "hi"), ("assistant", "hello")],
    "user imitates the marks": [("user", f"say {MARKS}"), ("assistant", "no")],
    "user repeats the answer": [("user", "yes"), ("assistant", "yes"), ("user", "yes")],
    "assistant says the marks": [("user", "quote"), ("assistant", f"{MARKS}that is it")],
    "answers in a row": [("user", "hi"), ("assistant", "one"), ("assistant", "two")],
    "users in a row": [("user", "a"), ("user", "b"), ("assistant", "c")],
    "an empty answer between": [
        ("user", "a"),
        ("assistant", ""),
        ("user", "b"),
        ("assistant", "c"),
    ],
    "an empty question": [("user", ""), ("assistant", "what?")],
    "ends with the user": [("user", "a"), ("assistant", "b"), ("user", "bye")],
    "white space": [("user", " a "), ("assistant", "  b\n\n"), ("user", "\n")],
}


def messages(turns: Turns) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def written_out(turns: Turns, tokenizer: Any) -> tuple[list[int], list[bool]]:
    """ChatML by hand: ids and mask of each piece, one after the other."""
    ids: list[int] = []
    mask: list[bool] = []
    for role, content in turns:
        own = role == "assistant" and bool(content.strip())
        pieces = ((f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", own), ("\n", False))
        for text, trained in pieces:
            found = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += found
            mask += [trained] * len(found)
    return ids, mask


@pytest.mark.parametrize("name", DIALOGUES)
@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "marked"])
def test_exactly_the_assistants_words_and_end_tokens_are_trained(name: str, template: str) -> None:
    tokenizer, turns = chat_tokenizer(template), DIALOGUES[name]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    ids, trained = encode_dialogue(messages(turns), "row", tokenizer, (end,))
    expected_ids, expected = written_out(turns, tokenizer)
    assert ids.tolist() == expected_ids
    assert trained.tolist() == expected
    answers = sum(role == "assistant" and bool(text.strip()) for role, text in turns)
    said = sum(text.count("<|im_end|>") for role, text in turns if role == "assistant")
    assert (ids[trained] == end).sum() == answers + said, "an end token closes every trained turn"


def test_the_end_token_is_added_where_the_template_has_none() -> None:
    plain = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer = chat_tokenizer(plain)
    ids, trained = encode_dialogue(messages(DIALOGUES["one turn"]), "row", tokenizer, (1,))
    assert ids[-1] == 1
    assert trained[-1]
    assert tokenizer.decode(ids[trained][:-1]) == "hello\n"


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = chat_tokenizer(FORGETFUL)
    with pytest.raises(DataError, match=r"row 7: .*not the beginning of its text of all"):
        encode_dialogue(messages(DIALOGUES["every turn"]), "row 7", tokenizer, (1,))


def test_what_the_template_refuses_is_refused_with_its_place() -> None:
    tokenizer = chat_tokenizer(ALTERNATING)
    with pytest.raises(DataError, match=r"row 7: .*roles must alternate"):
        encode_dialogue(messages(DIALOGUES["users in a row"]), "row 7", tokenizer, (1,))
    with pytest.raises(DataError, match="begins with an assistant turn"):
        encode_dialogue(messages([("assistant", "hi")]), "row 7", chat_tokenizer(), (1,))


def sft(template: str = "chat", **data: Any) -> Any:
    tokenizer = chat_tokenizer()
    section = StageData.model_validate(
        {"sources": [{"path": "x.jsonl"}], "max_tokens": 512, "template": template, **data}
    )
    end = int(tokenizer.eos_token_id)
    context = StageContext(data=section, tokenizer=tokenizer, end_ids=(end,))
    return build_stage(SftConfig(), context)


def read(stage: Any, **columns: Any) -> Any:
    [unit] = stage.read(Row(0, "line 1", columns), "data.jsonl")
    return unit


def said(stage: Any, unit: Any) -> str:
    [sequence] = unit.sequences
    return stage.tokenizer.decode(sequence.target_ids[sequence.target_mask])


def test_messages_a_dialogue_in_one_text_and_prompt_with_completion_are_the_same_unit() -> None:
    stage, turns = sft(), messages([("user", "hi"), ("assistant", "hello")])
    units = [
        read(stage, messages=turns),
        read(stage, messages="\n\nHuman: hi\n\nAssistant: hello"),
        read(stage, prompt="hi", completion="hello"),
        read(stage, prompt=turns[:1], completion=turns[1:]),
    ]
    assert len({unit.content for unit in units}) == 1
    for unit in units:
        assert said(stage, unit) == "hello<|im_end|>"
        assert unit.key == "hi"


def test_the_system_prompt_is_put_in_or_left_out() -> None:
    own = messages([("system", "old"), ("user", "hi"), ("assistant", "yes")])
    bare = own[1:]

    def text(stage: Any, turns: list[dict[str, str]]) -> str:
        [sequence] = read(stage, messages=turns).sequences
        return stage.tokenizer.decode(sequence.prompt_ids)

    assert "old" in text(sft(), own)
    assert "old" not in text(sft(drop_system=True), own)
    assert "new" in text(sft(system_prompt="new"), bare)
    assert "new" in text(sft(system_prompt="new", drop_system=True), own)
    with pytest.raises(DataError, match=r"line 1: has a system message of its own"):
        read(sft(system_prompt="new"), messages=own)


def test_a_plain_completion_is_trained_with_the_end_token_although_it_is_the_padding_token() -> (
    None
):
    stage = sft("none")
    tokenizer = stage.tokenizer
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    [sequence] = read(stage, prompt="2+2=", completion="4").sequences
    assert sequence.prompt_ids.tolist() == tokenizer("2+2=")["input_ids"]
    assert sequence.target_ids[-1] == tokenizer.eos_token_id
    assert sequence.target_mask is None
    assert tokenizer.decode(sequence.target_ids) == "4<|im_end|>"


@pytest.mark.parametrize(
    ("template", "columns", "reason"),
    [
        ("chat", {"text": "x"}, "expected the column messages, or prompt and completion"),
        ("none", {"messages": [{"role": "user", "content": "x"}]}, "data.template = 'none'"),
        ("none", {"prompt": ["x"], "completion": "y"}, "column 'prompt': found list"),
        (
            "chat",
            {"messages": [{"role": "user"}]},
            "expected text or a list of {role, content} messages",
        ),
    ],
)
def test_a_row_of_another_layout_is_refused_with_its_line(
    template: str, columns: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError) as error:
        read(sft(template), **columns)
    assert str(error.value).startswith("data.jsonl, line 1")
    assert reason in str(error.value)


@pytest.mark.parametrize("columns", [{"completion": " "}, {"completion": ""}])
def test_an_answer_without_text_teaches_nothing(columns: dict[str, str]) -> None:
    for template in ("chat", "none"):
        with pytest.raises(UnusableRow) as error:
            read(sft(template), prompt="hi", **columns)
        assert error.value.reason == "empty"


def test_what_is_trained_survives_the_cut_at_the_end() -> None:
    stage = sft()
    unit = read(stage, messages=messages(DIALOGUES["every turn"]))
    [whole] = unit.sequences
    shorter = stage.shorten(unit, whole.num_inputs - 2)
    [cut] = shorter.sequences
    assert cut.num_inputs == whole.num_inputs - 2
    assert np.array_equal(cut.target_ids, whole.target_ids[:-2])
    assert np.array_equal(cut.target_mask, whole.target_mask[:-2])
    assert stage.shorten(unit, len(whole.prompt_ids) - 1) is None
