"""What is wrong with a data file: the message says where, what, what was expected, and the cure."""

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_cluster.data.prompts import PromptSource
from rlhf_cluster.data.rows import expand, read_rows
from rlhf_cluster.errors import DataError
from rlhf_cluster.models.make_model import make_tokenizer
from rlhf_cluster.sections.rl_run import Data

TOKENIZER = make_tokenizer()


def refused(path: Path, **settings) -> str:
    with pytest.raises(DataError) as caught:
        PromptSource(Data(path=str(path), **settings), TOKENIZER, seed=0)
    assert str(caught.value).startswith(str(path))
    return str(caught.value)


def lines(folder: Path, *texts: str) -> Path:
    path = folder / "data.jsonl"
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


GOOD = '{"prompt": "1+1="}'


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"prompt": "1', r"line 3: not valid JSON \(.*\)\. JSONL has one JSON object per line"),
        ('["1+1="]', r"line 3: a JSON list, expected an object such as"),
        (
            '{"text": "x", "n": 1}',
            r"line 3: no column 'prompt'; found 'text', 'n'\. Set data\.prompt",
        ),
        (
            '{"prompt": 7}',
            r"line 3, column 'prompt': found int 7, expected text or a list of \{role",
        ),
        ('{"prompt": null}', r"line 3, column 'prompt': found NoneType None, expected text"),
        ('{"prompt": [{"role": "user"}]}', r"line 3, column 'prompt': found list .*expected text"),
        ('{"prompt": []}', r"line 3, column 'prompt': found list \[\], expected text"),
        ('{"prompt": ""}', r"line 3, column 'prompt': empty text\. Remove the row"),
        (
            '{"prompt": [{"role": "user", "content": "x"}]}',
            r"line 3, column 'prompt': found chat messages, but data\.template = 'none'\. Set",
        ),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, bad: str, says: str) -> None:
    assert re.search(says, refused(lines(tmp_path, GOOD, "", bad, GOOD)))


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(GOOD.encode() + b'\n{"prompt": "\xff\xfe"}\n')
    assert "line 2: not valid JSON" in refused(path)


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    assert "has no rows" in refused(lines(tmp_path, "", ""))
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"prompt": pa.array([], pa.string())}), path)
    assert "has no rows" in refused(path)


def test_a_missing_file_a_folder_and_a_strange_suffix_are_refused(tmp_path: Path) -> None:
    assert "no such file. Set data.path" in refused(tmp_path / "nothing.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    assert "a folder. Set data.path" in refused(tmp_path / "folder.jsonl")
    (tmp_path / "data.csv").write_text("prompt\nx\n")
    assert "ends in '.csv', expected .jsonl or .parquet" in refused(tmp_path / "data.csv")


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"prompt": ["a", "b"]}), path)
    path.write_bytes(path.read_bytes()[:-9])
    assert "not a readable Parquet file" in refused(path)
    path.write_bytes(b"")
    assert "not a readable Parquet file" in refused(path)


def test_parquet_problems_name_the_row(tmp_path: Path) -> None:
    path = tmp_path / "data.parquet"
    parquet.write_table(pa.table({"prompt": [1, 2]}), path)
    assert "row 0, column 'prompt': found int 1" in refused(path)
    assert "row 0: no column 'q'; found 'prompt'" in refused(path, prompt_column="q")


def test_rows_are_numbered_over_blank_lines_and_placed_by_line(tmp_path: Path) -> None:
    rows = read_rows(lines(tmp_path, GOOD, "", GOOD))
    assert [(row.number, row.place) for row in rows] == [(0, "line 1"), (1, "line 3")]


def test_the_limit_stops_reading_before_later_damage(tmp_path: Path) -> None:
    path = lines(tmp_path, GOOD, GOOD, "damage")
    assert len(read_rows(path, limit=2)) == 2


def test_environment_variables_in_a_path_are_replaced(tmp_path: Path) -> None:
    lines(tmp_path, json.dumps({"prompt": "1"}))
    path = expand("${WHERE}/data.jsonl", {"WHERE": str(tmp_path)})
    assert path == tmp_path / "data.jsonl"
    assert expand("a/$b.jsonl", {}) == Path("a/$b.jsonl")


@pytest.mark.parametrize("environment", [{}, {"WHERE": ""}])
def test_an_unset_variable_is_named(environment: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"\$\{WHERE\}/x\.jsonl.*variable WHERE is not set"):
        expand("${WHERE}/x.jsonl", environment)
