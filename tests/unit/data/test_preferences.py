"""Preferences from files: every layout, what is wrong with a row, and the real dialogues."""

import gzip
import json
import os
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_cluster.data.dialogues import is_dialogue, parse_dialogue
from rlhf_cluster.data.preferences import (
    LabelledResponse,
    Pair,
    Ranking,
    UnusableRow,
    parse_labelled,
    parse_pair,
    parse_ranking,
    split_key,
)
from rlhf_cluster.data.rows import read_rows, texts
from rlhf_cluster.errors import DataError

ASK = {"role": "user", "content": "2+2?"}
FOUR, FIVE = ({"role": "assistant", "content": c} for c in ("4", "5"))
DIALOGUE = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 2+2?\n\nAssistant: "
HISTORY = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    ASK,
]

SAME: dict[str, tuple[dict[str, Any], Any]] = {
    "texts": ({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "2+2?"),
    "messages and texts": ({"prompt": [ASK], "chosen": "4", "rejected": "5"}, [ASK]),
    "messages that go on": ({"prompt": [ASK], "chosen": [FOUR], "rejected": [FIVE]}, [ASK]),
    "messages that repeat": (
        {"prompt": [ASK], "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        [ASK],
    ),
    "a text and messages that repeat it": (
        {"prompt": "2+2?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        "2+2?",
    ),
    "dialogues of messages": (
        {"chosen": [*HISTORY, FOUR], "rejected": [*HISTORY, FIVE]},
        HISTORY,
    ),
    "dialogues as text": ({"chosen": DIALOGUE + "4", "rejected": DIALOGUE + "5 "}, HISTORY),
    "a dialogue as the prompt": ({"prompt": DIALOGUE, "chosen": "4", "rejected": "5"}, HISTORY),
}


@pytest.mark.parametrize(("columns", "prompt"), SAME.values(), ids=SAME)
def test_every_layout_of_a_pair_is_read(columns: dict[str, Any], prompt: Any) -> None:
    assert parse_pair(columns, "f, line 1") == Pair(prompt=prompt, chosen="4", rejected="5")
    assert parse_pair({**columns, "margin": 2, "id": "x"}, "f").margin == 2.0


def test_labels_are_read_and_a_pair_makes_two_of_them() -> None:
    row = {"prompt": "2+2?", "completion": "4", "label": True}
    assert parse_labelled(row, "f") == [
        LabelledResponse(prompt="2+2?", completion="4", desirable=True)
    ]
    assert parse_labelled({**row, "label": 0}, "f")[0].desirable is False
    both = parse_labelled({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "f")
    assert [(r.completion, r.desirable) for r in both] == [("4", True), ("5", False)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no layout": (
        {"question": "x", "good": "y"},
        "'question', 'good' match no layout.*Expected prompt",
    ),
    "a null": (
        {"prompt": "x", "chosen": "y", "rejected": None},
        "the columns 'prompt', 'chosen' match no layout",
    ),
    "labels": ({"prompt": "x", "completion": "y", "label": True}, "pairs are needed.*'kto'"),
    "a number": (
        {"prompt": "x", "chosen": 7, "rejected": "z"},
        r"column 'chosen': found int 7, expected text or a list of \{role",
    ),
    "no role": (
        {"prompt": [{"content": "x"}], "chosen": "y", "rejected": "z"},
        "column 'prompt': found list",
    ),
    "an empty prompt": ({"prompt": "", "chosen": "y", "rejected": "z"}, "'prompt': empty text"),
    "another prompt repeated": (
        {"prompt": "1+1?", "chosen": [ASK, FOUR], "rejected": [ASK, FIVE]},
        "column 'chosen': 2 messages .* after exactly the prompt's messages",
    ),
    "the user has the last word": (
        {"chosen": [FOUR, ASK], "rejected": [FOUR, ASK]},
        "column 'chosen': ends with a turn of 'user' after 1 others",
    ),
    "an answer to nothing": (
        {"chosen": [FOUR], "rejected": [FIVE]},
        "'assistant' after 0 others, expected the assistant's answer to at least one",
    ),
    "no dialogue": (
        {"chosen": "4", "rejected": "5"},
        "found '4', expected a dialogue that begins with 'Human:'",
    ),
    "something before a dialogue": (
        {"chosen": "Note\n\nHuman: a\n\nAssistant: b", "rejected": DIALOGUE},
        "found 'Note', expected a dialogue",
    ),
    "a margin of another kind": (
        {"prompt": "x", "chosen": "y", "rejected": "z", "margin": "big"},
        "column 'margin': found str 'big', expected a number",
    ),
}


@pytest.mark.parametrize(("columns", "says"), BAD.values(), ids=BAD)
def test_a_row_that_does_not_fit_is_refused_with_its_place(columns: Any, says: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_pair(columns, "data.jsonl, line 3")
    assert not isinstance(caught.value, UnusableRow)
    assert re.match(rf"data\.jsonl, line 3.*{says}", str(caught.value), flags=re.DOTALL)


def test_rankings_are_read_best_first_and_a_pair_is_one_of_two() -> None:
    row = {"prompt": "2+2?", "ranking": ["4", [FIVE], "6"]}
    assert parse_ranking(row, "f") == Ranking(prompt="2+2?", responses=("4", "5", "6"))
    pair = parse_ranking({"prompt": "2+2?", "chosen": "4", "rejected": "5"}, "f")
    assert pair.responses == ("4", "5")
    with pytest.raises(DataError, match="f, column 'ranking': found list .*at least two"):
        parse_ranking({"prompt": "2+2?", "ranking": ["4"]}, "f")
    for listed, reason in ((["4", "5", "4"], "equal"), (["4", " "], "empty")):
        with pytest.raises(UnusableRow) as caught:
            parse_ranking({"prompt": "2+2?", "ranking": listed}, "f")
        assert caught.value.reason == reason


def test_a_label_that_is_neither_is_refused() -> None:
    with pytest.raises(DataError, match=r"f, column 'label': found str 'good', expected true"):
        parse_labelled({"prompt": "x", "completion": "y", "label": "good"}, "f")


UNUSABLE: dict[str, list[dict[str, Any]]] = {
    "equal": [{"prompt": "x", "chosen": "y", "rejected": "y"}, {"chosen": DIALOGUE + "4"}],
    "empty": [{"prompt": "x", "chosen": " ", "rejected": "y"}, {"rejected": DIALOGUE}],
    "history": [{"rejected": "\n\nHuman: Hello\n\nAssistant: 4"}],
}


@pytest.mark.parametrize("reason", UNUSABLE)
def test_a_row_that_teaches_nothing_says_why(reason: str) -> None:
    for columns in UNUSABLE[reason]:
        row = {"chosen": DIALOGUE + "4", "rejected": DIALOGUE + "4", **columns}
        with pytest.raises(UnusableRow, match="f, line 2: ") as caught:
            parse_pair(row, "f, line 2")
        assert caught.value.reason == reason
        assert pickle.loads(pickle.dumps(caught.value)).reason == reason


def test_a_dialogue_keeps_every_character_of_its_turns() -> None:
    text = "\n\nHuman: one\n\ntwo\nHuman: no mark\n\nAssistant: Human: three\n\n- four"
    found = parse_dialogue(text, "f")
    assert [m["content"] for m in found] == ["one\n\ntwo\nHuman: no mark", "Human: three\n\n- four"]
    assert is_dialogue("Human: hi")
    assert not is_dialogue("A Human: hi")
    assert not is_dialogue("")


def test_dialogues_that_go_on_from_one_another_have_one_opening() -> None:
    start = parse_pair(
        {"chosen": [*HISTORY[:1], FOUR], "rejected": [*HISTORY[:1], FIVE]}, "f"
    ).prompt
    later = parse_pair({"chosen": [*HISTORY, FOUR], "rejected": [*HISTORY, FIVE]}, "f").prompt
    with_system = [{"role": "system", "content": "Be kind."}, *HISTORY]
    assert split_key(start) == split_key(later) == split_key(with_system) == split_key("Hi") == "Hi"


def test_the_texts_of_a_row_have_no_marks_and_come_once() -> None:
    row = {"chosen": DIALOGUE + "4", "rejected": DIALOGUE + "5", "n": 3, "more": [ASK, {"role": 1}]}
    assert list(texts(row)) == ["Hi", "Hello!", "2+2?", "4", "5"]


# Files


ROWS = [{"prompt": f"p{i}", "chosen": "y", "rejected": "z"} for i in range(3)]


def test_packed_lines_and_folders_of_datasets_give_the_same_rows(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(text)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        file.write(text)
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    save_dataset(tmp_path / "all" / "train", [ROWS[:2], ROWS[2:]])
    names = ["a.jsonl", "b.jsonl.gz", "c.parquet", "all/train"]
    found = [[row.columns for row in read_rows(tmp_path / name)] for name in names]
    assert found == [ROWS] * 4
    assert read_rows(tmp_path / "b.jsonl.gz")[2].place == "line 3"
    assert read_rows(tmp_path / "all/train")[2].place == "row 2"
    with pytest.raises(DataError, match=r"all: a folder. It holds the splits train: set data.path"):
        read_rows(tmp_path / "all")


def save_dataset(folder: Path, files: list[list[dict[str, str]]]) -> None:
    """What `Dataset.save_to_disk` writes, in several files."""
    folder.mkdir(parents=True)
    names = [f"data-{n:05d}-of-{len(files):05d}.arrow" for n in range(len(files))]
    for name, rows in zip(names, files, strict=True):
        table = pa.Table.from_pylist(rows)
        with (
            pa.OSFile(str(folder / name), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as out,
        ):
            out.write_table(table)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))


def test_damaged_packed_files_and_folders_are_refused(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"prompt": "x"}\n' * 500)
    for name, content in (
        ("cut", packed[:-20]),
        ("no", b"hello"),
        ("torn", packed[:12] + b"\0" * 30),
    ):
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}\.jsonl\.gz: cannot be read"):
            read_rows(path)
    save_dataset(tmp_path / "d", [ROWS])
    (tmp_path / "d" / "data-00000-of-00001.arrow").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"d: not a readable folder of datasets"):
        read_rows(tmp_path / "d")
    (tmp_path / "d" / "state.json").write_text('{"_data_files": [{}]}')
    with pytest.raises(DataError, match=r"d: not a readable folder of datasets \(KeyError"):
        read_rows(tmp_path / "d")


@pytest.mark.skipif("RLHF_REAL_DATA" not in os.environ, reason="RLHF_REAL_DATA is not set")
def test_the_real_preferences_are_read_and_what_is_left_out_is_counted() -> None:
    path = Path(os.environ["RLHF_REAL_DATA"]) / "hh-rlhf" / "harmless-base-2000.jsonl.gz"
    found: Counter[str] = Counter()
    for row in read_rows(path):
        try:
            pair = parse_pair(row.columns, f"{path}, {row.place}")
        except UnusableRow as error:
            found[error.reason] += 1
            continue
        found["usable"] += 1
        assert pair.prompt[0]["role"] == "user"  # type: ignore[index]
        assert "\n\nHuman:" not in pair.chosen + pair.rejected
    assert found == {"usable": 1992, "history": 4, "empty": 4}
