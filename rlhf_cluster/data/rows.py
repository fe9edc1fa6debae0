"""Rows of a JSONL or Parquet file, packed JSONL, or a folder of Hugging Face `datasets`.

Promises:
- every row keeps all its columns with their types, and its position in the data set;
- every defect is one `DataError` that names file, line, value, expectation and fix.

`texts` yields all texts of a row in any layout, for a tokenizer to learn from. The marks of a dialogue
that is written as one text ("Human:", "Assistant:") are not included, as a model never sees them. The
turns that the two dialogues of a preference share are yielded once.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_cluster.data.dialogues import is_dialogue, parse_dialogue
from rlhf_cluster.errors import DataError


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a file. `number` counts from 0; `place` locates the row in messages ("line 3")."""

    number: int
    place: str
    columns: Mapping[str, Any]


def expand(path: str, environment: Mapping[str, str] = os.environ) -> Path:
    """Replace each `${NAME}` by the environment variable. Raises `DataError` for an unset one."""

    def value(match: re.Match[str]) -> str:
        name = match[1]
        if not environment.get(name):
            raise DataError(
                f"data path {path!r}: the environment variable {name} is not set. Export {name}, "
                "or write the path out"
            )
        return environment[name]

    return Path(re.sub(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}", value, path))


def read_rows(path: Path, limit: int | None = None) -> list[Row]:
    """Read the first `limit` rows of the file, all if None. Raises `DataError`, also for no rows."""
    try:
        rows = list(islice(_reader(path)(path), limit))
    except (OSError, EOFError, zlib.error) as error:  # the last two of a damaged .gz
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {error})") from error
    if not rows:
        raise DataError(f"{path}: has no rows. Give a file with at least one")
    return rows


def _reader(path: Path) -> Callable[[Path], Iterator[Row]]:
    """Return the reader for a file's suffix, or for a folder of `datasets` (it has a state.json)."""
    if (path / "state.json").is_file():
        return _read_dataset_folder
    name = path.name.removesuffix(".gz") if path.name.endswith(".jsonl.gz") else path.name
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.is_dir():
        splits = sorted(p.parent.name for p in path.glob("*/state.json"))
        cure = "Set data.path to a .jsonl, .jsonl.gz or .parquet file"
        if splits:
            cure = f"It holds the splits {', '.join(splits)}: set data.path to one of these folders"
        raise DataError(f"{path}: a folder. {cure}")
    if (suffix := Path(name).suffix) not in readers:
        raise DataError(
            f"{path}: ends in {suffix!r}, expected .jsonl or .parquet (or .jsonl.gz, or a folder that "
            "datasets' save_to_disk wrote). Convert or rename it"
        )
    if not path.is_file():
        raise DataError(f"{path}: no such file. Set data.path to a .jsonl or .parquet file")
    return readers[suffix]


def column(row: Row, path: Path | str, name: str, setting: str) -> Any:
    """Return the value of a required column. `setting` is the configuration key that names it."""
    if name not in row.columns:
        raise DataError(
            f"{path}, {row.place}: no column {name!r}; found {', '.join(map(repr, row.columns))}. "
            f"Set {setting} to one of them"
        )
    return row.columns[name]


def _read_jsonl(path: Path) -> Iterator[Row]:
    number = 0
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"line {line_number}"
            try:
                value = json.loads(line)
            except ValueError as error:  # also not UTF-8
                raise DataError(
                    f"{path}, {place}: not valid JSON ({error}). JSONL has one JSON object per line"
                ) from error
            if not isinstance(value, dict):
                raise DataError(
                    f"{path}, {place}: a JSON {type(value).__name__}, expected an object such as "
                    '{"prompt": "..."}'
                )
            yield Row(number, place, value)
            number += 1


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for values in batch.to_pylist():
                    yield Row(number, f"row {number}", values)
                    number += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}). Write it again") from error


def _read_dataset_folder(path: Path) -> Iterator[Row]:
    """Read the output of `Dataset.save_to_disk`: state.json lists Arrow streams in order."""
    import pyarrow

    number = 0
    try:
        state = json.loads((path / "state.json").read_bytes())
        for name in [file["filename"] for file in state["_data_files"]]:
            with (
                pyarrow.memory_map(str(path / name)) as file,
                pyarrow.ipc.open_stream(file) as stream,
            ):
                for batch in stream:
                    for values in batch.to_pylist():
                        yield Row(number, f"row {number}", values)
                        number += 1
    except (pyarrow.ArrowException, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: not a readable folder of datasets ({type(error).__name__}: {error}). Write it "
            "again with save_to_disk"
        ) from error


def texts(columns: Mapping[str, Any]) -> Iterator[str]:
    """Yield every text in the columns, and in lists of messages there, once each."""
    yield from dict.fromkeys(text for value in columns.values() for text in _texts(value) if text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        if is_dialogue(value):
            yield from (turn["content"] for turn in parse_dialogue(value, "a row"))
        else:
            yield value
    elif isinstance(value, list):
        for message in value:
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                yield message["content"]
